"""A run: what is checked, refused, timed and computed from the times."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
from bench_fakes import SMALL, Clock, ClockedBackend, FakePeer, KnownLimits, settings

from npmoe import get_backend
from npmoe.backends import NumpyBackend
from npmoe.benchmark import (
    last_line,
    memory,
    omission_text,
    parse_case,
    run_benchmark,
    table_text,
)
from npmoe.benchmark import run as run_module
from npmoe.benchmark.agreement import agreement_bound, compare, fingerprint_gradients
from npmoe.benchmark.cases import Load
from npmoe.benchmark.implementations import GradientArrays, build_backend
from npmoe.benchmark.inputs import make_inputs
from npmoe.errors import UnsupportedError
from npmoe.testing import Report, check_backend
from npmoe.testing.conformance.report import CheckResult
from npmoe.testing.faults.backend import UnwrittenEmptyExperts

pytest.importorskip("threadpoolctl")


@pytest.fixture
def trusting(monkeypatch):
    """Find every backend green; return the dtypes that were checked."""
    asked = []

    def check(backend, *, quick, dtype, name, progress):
        asked.append((name, dtype, quick))
        progress("some-check")
        return Report(target=name, kind="backend", results=[], failures=[])

    monkeypatch.setattr(run_module, "check_backend", check)
    monkeypatch.setattr(memory, "peak_resident", lambda _: 10_000_000)  # slow, tested elsewhere
    return asked


def bench(chosen, backends, peers=(), clock=None, **options):
    return run_benchmark(
        chosen, backends, peers, limits=KnownLimits(), clock=clock or time.perf_counter, **options
    )


# --- figures


def test_medians_shares_and_ratios(trusting):
    clock = Clock()
    peers = [FakePeer("slow", clock, 4.0), FakePeer("fast", clock, 2.0)]
    result = bench(settings(), [ClockedBackend(clock)], peers, clock)
    assert result.complete
    assert result.checked == {"clocked": True}
    assert trusting == [("clocked", "float32", True)]
    assert [c.direction for c in result.cases] == ["forward", "forward+backward"]
    for found, scale in zip(result.cases, (1.0, 3.0), strict=True):
        assert found.num_rounds == 3
        by_name = {t.name: t for t in found.timings}
        assert list(by_name) == ["clocked", "slow", "fast"]
        assert [t.is_peer for t in found.timings] == [False, True, True]
        assert by_name["clocked"].seconds.values == (1.0, 1.0, 1.0)
        assert by_name["fast"].seconds.median == 2.0 * scale
        assert by_name["clocked"].ratio_to_best_peer == 2.0 * scale
        assert by_name["slow"].ratio_to_best_peer == 0.5
        assert by_name["fast"].ratio_to_best_peer == 1.0
        floor = max(found.cost.flops / 1e9, found.cost.weight_bytes / 1e8)
        assert found.floor_seconds == floor
        assert by_name["slow"].share_of_limit == floor / (4.0 * scale)
        assert by_name["fast"].memory.arrays is None
        assert by_name["clocked"].memory.arrays > 0
        assert all(0 <= t.agreement.difference <= t.agreement.bound for t in found.timings)
    assert found.load.num_rows == 24
    assert 1 <= found.load.used_experts <= 4


def test_what_is_counted_is_the_real_routing(trusting):
    result = bench(settings(cases=(parse_case("1,16,8,9,2"),)), [get_backend("numpy")])
    assert result.cases[0].load == Load(num_rows=2, used_experts=2, largest=1)


def test_gradient_arrays_are_reused_and_not_counted(trusting):
    """With a token per expert, gradients are far larger than everything else of a step."""
    case = parse_case("16,64,64,16,1")
    result = bench(settings(cases=(case,), rounds=1), [get_backend("numpy")])
    for found in result.cases:
        measured = found.timings[0].memory.arrays
        assert found.cost.extra_bytes / 2 < measured < 4 * case.num_weights / 4


def test_the_routing_is_not_counted(monkeypatch):
    inputs = make_inputs(SMALL, "float32")
    one = dataclasses.replace(
        build_backend(get_backend("numpy"), inputs, GradientArrays()),
        forward=lambda: np.empty(100_000, np.uint8),
    )
    monkeypatch.setattr(memory, "peak_resident", lambda _: None)
    for routing_bytes in (0, 30_000):
        found = memory.measure_memory(one, "forward", routing_bytes)
        assert 0 <= found.arrays - (100_000 - routing_bytes) < 2_000
        assert found.resident is None


def test_gradients_that_a_peer_makes_anew_are_subtracted(trusting):
    clock = Clock()
    result = bench(settings(rounds=1), [ClockedBackend(clock)], [FakePeer("p", clock, 1.0)], clock)
    forward, step = ({t.name: t.memory.resident for t in c.timings} for c in result.cases)
    assert forward["p"] == forward["clocked"] == step["clocked"] < 10_000_000
    E, H = SMALL.num_experts, SMALL.hidden_size
    assert forward["p"] - step["p"] == 4 * (SMALL.num_weights + E * H)


def test_without_peers_there_is_no_ratio(trusting):
    result = bench(settings(directions=("forward",)), [get_backend("numpy")])
    assert result.cases[0].timings[0].ratio_to_best_peer is None
    assert last_line(result) == "Timed numpy against no peer in T12-H16-I24-E4-K2 (forward)."


def test_progress_never_stands_still_or_goes_back(trusting):
    said = []
    chosen = settings(budget=1e-9, rounds=5)
    clock = Clock()
    bench(chosen, [ClockedBackend(clock)], clock=clock, progress=lambda *now: said.append(now))
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.05
    assert 0.9 < shares[-1] < 1
    words = [what for what, _ in said]
    assert words[:3] == ["clocked: some-check", f"{SMALL.name}: inputs", words[2]]
    assert words[2] == f"{SMALL.name} forward: checks"
    assert f"{SMALL.name} forward+backward: round 2" in words
    assert f"{SMALL.name} forward+backward: round 3" not in words


# --- refusals


def test_a_backend_with_a_planted_mistake_is_not_timed(monkeypatch):
    def check(backend, **options):
        if backend.name == "numpy":  # green, as others test
            return Report(target="numpy", kind="backend", results=[], failures=[])
        return check_backend(backend, **options)

    monkeypatch.setattr(run_module, "check_backend", check)
    events = []
    result = bench(
        settings(rounds=1, directions=("forward",)),
        [UnwrittenEmptyExperts(), get_backend("numpy")],
        on_event=events.append,
    )
    assert result.checked == {"unwritten-empty-experts": False, "numpy": True}
    assert [t.name for t in result.cases[0].timings] == ["numpy"]
    (omission,) = result.omissions
    assert "empty-experts-have-zero-gradient" in omission.red_checks
    assert events == [omission, *result.cases]
    assert not result.complete
    text = omission_text(omission)
    assert text.startswith("not timed: unwritten-empty-experts: its conformance run is red: ")
    assert "empty-experts-have-zero-gradient" in text
    assert "; refused or missing: unwritten-empty-experts (its conf" in last_line(result)


def test_a_run_without_a_green_backend_times_nothing(monkeypatch):
    failed = CheckResult(name="red", about="", status="failed", cases=1, seconds=0.0)
    failures = [SimpleNamespace(check="red"), SimpleNamespace(check="redder")]
    report = Report(target="", kind="backend", results=[failed], failures=failures)
    monkeypatch.setattr(run_module, "check_backend", lambda *_, **__: report)
    result = bench(settings(weights="float16"), [get_backend("numpy")])
    assert result.cases == ()
    assert result.checked == {"numpy": False}
    assert not result.complete
    assert last_line(result) == (
        "Timed nothing; refused or missing: numpy (its conformance run is red: red, redder)."
    )


def test_half_weights_are_checked_besides_float32(trusting):
    chosen = settings(weights="float16", rounds=1)
    result = bench(chosen, [get_backend("numpy")])
    assert trusting == [("numpy", "float32", True), ("numpy", "float16", True)]
    assert "float32, expert weights float16; " in table_text(result.cases[0], chosen)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("output", "output"),
        ("hidden_states", "gradient of hidden_states"),
        ("router_weight", "gradient of router_weight"),
        ("gate_up_proj", "gradient of gate_up_proj"),
        ("down_proj", "gradient of down_proj"),
    ],
)
@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_results_that_differ_are_not_timed(trusting, field, words, wrong):
    """A single row or expert that is wrong by a thousandth, or not a number, is enough."""
    clock = Clock()
    peer = FakePeer("odd", clock, 1.0, wrong=wrong, wrong_field=field)
    result = bench(settings(), [ClockedBackend(clock)], [peer], clock)
    (omission,) = result.omissions
    spoilt = "forward" if field == "output" else "forward+backward"
    assert (omission.name, omission.case) == ("odd", SMALL.name)
    assert omission.direction == spoilt
    assert omission.reason.startswith(f"its {words} differs from the numpy backend's by ")
    assert not result.complete
    assert {c.direction: len(c.timings) for c in result.cases} == {
        "forward": 1 + (spoilt != "forward"),
        "forward+backward": 1 + (spoilt == "forward"),
    }


def test_a_difference_within_rounding_is_allowed(trusting):
    clock = Clock()
    peer = FakePeer("other", clock, 1.0, wrong=1e-6, wrong_field="output")
    assert bench(settings(), [ClockedBackend(clock)], [peer], clock).complete


def test_gradients_that_are_not_written_are_found(trusting):
    class Lazy(NumpyBackend):
        """Returns the caller's arrays as they are, which hold the right gradients."""

        name = "lazy"

        def experts_backward(self, *args, out=None, **options):
            grads = super().experts_backward(*args, **options)
            if out is None:
                return grads
            return dataclasses.replace(
                grads, gate_up_proj=out.gate_up_proj, down_proj=out.down_proj
            )

    result = bench(settings(directions=("forward+backward",)), [Lazy()])
    (omission,) = result.omissions
    assert "differs from the numpy backend's by inf" in omission.reason
    assert result.cases == ()


def test_what_a_backend_cannot_do_is_an_omission(trusting):
    class Forwards(NumpyBackend):
        name = "forwards"

        def experts_backward(self, *_, **__):
            raise UnsupportedError("experts_backward: dtype must be float64, got float32.")

    result = bench(settings(), [Forwards()])
    assert [c.direction for c in result.cases] == ["forward"]
    assert omission_text(result.omissions[0]) == (
        f"not timed: forwards in {SMALL.name}, forward+backward: experts_backward: dtype must be "
        "float64, got float32."
    )
    assert not result.complete


def test_what_a_peer_leaves_out_counts_only_if_it_was_named(trusting):
    clock = Clock()
    peer = FakePeer("picky", clock, 1.0, not_timed={"forward+backward": "it takes minutes"})
    missing = FakePeer("missing", clock, 1.0, ok=False)
    result = bench(settings(), [ClockedBackend(clock)], [peer, missing], clock)
    assert result.complete
    assert peer.calls.count("step") == 0
    assert missing.calls == []
    assert last_line(result) == (
        f"Timed clocked against picky in {SMALL.name} (forward, forward+backward); skipped: "
        f"missing (needs a package), picky in {SMALL.name} forward+backward (it takes minutes)."
    )
    named = frozenset(["picky"])
    result = bench(settings(), [ClockedBackend(clock)], [peer], clock, asked_peers=named)
    assert not result.complete
    assert "; refused or missing: picky in " in last_line(result)


def test_places_are_named_only_where_they_say_something(trusting):
    cases = (SMALL, parse_case("3,16,24,4,2"))
    clock = Clock()
    never = dict.fromkeys(("forward", "forward+backward"), "no such dtype")
    peer = FakePeer("peer", clock, 1.0, not_timed=never)
    result = bench(settings(cases=cases), [ClockedBackend(clock)], [peer], clock)
    assert last_line(result).endswith("; skipped: peer (no such dtype).")
    fewer = tuple(o for o in result.omissions if o.case == SMALL.name)
    part = dataclasses.replace(result, omissions=fewer)
    assert last_line(part).endswith(f"; skipped: peer in {SMALL.name} (no such dtype).")


# --- agreement


def test_the_bound_is_far_above_rounding_and_far_below_a_mistake():
    for sizes, dtype in (("40,64,96,4,2", "float32"), ("300,16,8,8,8", "float64")):
        case = parse_case(sizes)
        inputs = make_inputs(case, dtype)
        exact = make_inputs(case, dtype)
        exact = dataclasses.replace(
            exact,
            params=dataclasses.replace(
                exact.params,
                **{
                    name: getattr(exact.params, name).astype(np.longdouble).astype("float64")
                    for name in ("router_weight", "gate_up_proj", "down_proj")
                },
            ),
            hidden_states=exact.hidden_states.astype("float64"),
            grad_output=exact.grad_output.astype("float64"),
        )
        prints = [
            fingerprint_gradients(build_backend(get_backend(b), i, GradientArrays()).step())
            for b, i in (("numpy", inputs), ("reference", exact))
        ]
        load = Load(num_rows=case.num_tokens * case.top_k, used_experts=1, largest=case.num_tokens)
        bound = agreement_bound(case, load, "forward+backward", dtype)
        difference = compare(*prints, bound).difference
        assert difference < bound / 4
        assert bound < 1e-3


def test_shapes_that_differ_are_no_agreement():
    inputs = make_inputs(SMALL, "float32")
    step = build_backend(get_backend("numpy"), inputs, GradientArrays()).step()
    right = fingerprint_gradients(step)
    wrong = fingerprint_gradients(dataclasses.replace(step, hidden_states=step.hidden_states[1:]))
    found = compare(wrong, right, 1.0)
    assert not found.ok
    assert found.where == "shape of gradient of hidden_states"


# --- text and JSON


def test_the_table_is_aligned_and_fastest_first(trusting):
    clock = Clock()
    peers = [FakePeer("a-peer-with-a-long-name", clock, 0.5), FakePeer("z", clock, 0.004)]
    chosen = settings(directions=("forward",))
    found = bench(chosen, [ClockedBackend(clock)], peers, clock).cases[0]
    text = table_text(dataclasses.replace(found, other_load=None), chosen)
    head, limits, header, *rows = text.splitlines()
    assert head.startswith(f"{SMALL.name}, forward: T=12 H=16 I=24 E=4 K=2, float32; ")
    assert head.endswith(f"of 4 experts used, at most {found.load.largest} rows each")
    assert limits.startswith("  limits 1.0 GFLOP/s and 0.1 GB/s: floor 0.184")
    assert limits.endswith(" ms, set by memory; 3 rounds")
    assert [row.split()[0] for row in rows] == ["z", "a-peer-with-a-long-name", "clocked"]
    assert len({len(row) for row in (header, *rows)}) == 1
    assert rows[2].split()[1:5] == ["1000.0", "1000.0", "-", "1000.0"]
    assert rows[0].split()[1] == "4.000"
    assert rows[0].split()[6] == "1.00"
    assert rows[0].split()[7] == "-"


def test_a_disturbed_table_says_so(trusting):
    chosen = settings(directions=("forward",), rounds=1)
    found = bench(chosen, [get_backend("numpy")]).cases[0]
    loud = dataclasses.replace(found, other_load=1.26)
    assert "  DISTURBED: other processes kept 1.3 cores busy; run it again\n" in table_text(
        loud, chosen
    )
    for load in (0.05, None):
        quiet = dataclasses.replace(found, other_load=load)
        assert "DISTURBED" not in table_text(quiet, chosen)
    assert "1 round\n" in table_text(found, chosen)


def keys(value):
    if isinstance(value, dict):
        return {name: keys(child) for name, child in value.items()}
    return None


def test_the_json_has_the_structure_that_the_readme_says(trusting):
    clock = Clock()
    peer = FakePeer("p", clock, 2.0, not_timed={"forward+backward": "r"})
    result = bench(settings(), [ClockedBackend(clock)], [peer], clock)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    sample = dict.fromkeys(("median", "lower_quartile", "upper_quartile", "values"))
    assert values["schema"] == 1
    assert values["complete"] is True
    assert values["checked"] == {"clocked": True}
    assert values["settings"]["cases"] == [SMALL.name]
    assert values["omissions"] == [
        {
            "name": "p",
            "reason": "r",
            "case": SMALL.name,
            "direction": "forward+backward",
            "red_checks": [],
            "asked": False,
        }
    ]
    assert set(values) == {
        *("schema", "complete", "machine", "settings", "checked", "cases", "omissions")
    }
    assert len(values["cases"]) == 2
    assert keys(values["cases"][0]) == {
        "case": dict.fromkeys(
            ("name", "num_tokens", "hidden_size", "intermediate_size", "num_experts", "top_k")
        ),
        "direction": None,
        "load": dict.fromkeys(("num_rows", "used_experts", "largest")),
        "cost": dict.fromkeys(("flops", "weight_bytes", "extra_bytes", "intensity")),
        "rounds": None,
        "other_load": None,
        "limits": {
            "flops_per_second": sample,
            "bytes_per_second": sample,
            "floor_seconds": None,
            "bound_by": None,
        },
        "implementations": None,
    }
    ours, theirs = values["cases"][0]["implementations"]
    assert keys(ours) == {
        "name": None,
        "is_peer": None,
        "seconds": sample,
        "share_of_limit": None,
        "ratio_to_best_peer": None,
        "memory": dict.fromkeys(("arrays", "resident")),
        "agreement": dict.fromkeys(("difference", "bound", "where")),
    }
    assert ours["seconds"]["values"] == [1.0, 1.0, 1.0]
    assert theirs["ratio_to_best_peer"] == 1.0
    assert values["cases"][0]["limits"]["bound_by"] == "memory"
