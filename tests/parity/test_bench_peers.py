# ruff: noqa: E402  # imports follow importorskip
"""The peers that ``npmoe bench`` times: they compute the same layer, each in its own way."""

from __future__ import annotations

import time

import pytest

WHY = "peers need the extra npmoe[parity]"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("threadpoolctl")

from transformers.models.mixtral import modeling_mixtral

from npmoe import get_backend
from npmoe.benchmark import PEERS, Settings, parse_case, run_benchmark
from npmoe.benchmark.inputs import make_inputs
from npmoe.benchmark.limits import MeasuredLimits
from npmoe.benchmark.threads import limit_threads

BY_NAME = {peer.name: peer for peer in PEERS}


def run(case: str, **changes: object):
    settings = {
        "cases": (parse_case(case),),
        "directions": ("forward", "forward+backward"),
        "dtype": "float32",
        "weights": "float32",
        "rounds": 1,
        "budget": 1.0,
        "threads": 1,
    } | changes
    limits = MeasuredLimits("float32", 1, gemm_size=64, read_bytes=4000)
    backend = get_backend("numpy")
    with pytest.MonkeyPatch.context() as patch:  # conformance is tested elsewhere
        green = type("Green", (), {"failures": ()})
        patch.setattr("npmoe.benchmark.run.check_backend", lambda *_, **__: green)
        result = run_benchmark(Settings(**settings), [backend], PEERS, limits=limits)
    limits.close()
    return result


def test_peers_agree_with_the_numpy_backend() -> None:
    result = run("40,32,48,8,2")
    assert result.omissions == ()
    for found in result.cases:
        assert [t.name for t in found.timings] == ["numpy", "hf-eager", "hf-grouped_mm"]
        for timing in found.timings[1:]:
            assert timing.is_peer
            assert 0 <= timing.agreement.difference < timing.agreement.bound / 4
            assert timing.memory.arrays is None


def test_a_peer_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_mixtral.MixtralSparseMoeBlock.forward

    def scaled(self, hidden):
        return forward(self, hidden) * 1.001

    monkeypatch.setattr(modeling_mixtral.MixtralSparseMoeBlock, "forward", scaled)
    result = run("9,16,24,4,2")
    assert {(o.name, o.direction) for o in result.omissions} == {
        (name, direction) for name in BY_NAME for direction in ("forward", "forward+backward")
    }
    assert not result.complete


def test_each_peer_runs_its_own_experts() -> None:
    """Otherwise both names would stand for one implementation."""
    inputs = make_inputs(parse_case("5,16,24,4,2"), "float32")
    calls = {name: [] for name in BY_NAME}
    for name, peer in BY_NAME.items():
        one = peer.build(inputs)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            one.forward()
        calls[name] = {event.key for event in found.key_averages()}
    assert any("grouped_mm" in key for key in calls["hf-grouped_mm"])
    assert not any("grouped_mm" in key for key in calls["hf-eager"])


def test_float64_is_eager_alone() -> None:
    result = run("9,16,24,4,2", dtype="float64", weights="float64")
    assert {(o.name, o.reason) for o in result.omissions} == {
        ("hf-grouped_mm", "its grouped_mm has no float64")
    }
    assert [t.name for c in result.cases for t in c.timings] == 2 * ["numpy", "hf-eager"]


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_no_peer_has_half_weights_beside_float32(weights: str) -> None:
    if weights == "bfloat16":
        pytest.importorskip("ml_dtypes")
    result = run("9,16,24,4,2", weights=weights)
    assert result.complete
    assert len(result.omissions) == 4
    assert {o.reason for o in result.omissions} == {
        "it has no half-precision weights beside float32 tokens"
    }


def test_eager_does_not_go_backward_through_many_experts() -> None:
    start = time.perf_counter()
    result = run("9,16,24,9,2")
    (omission,) = result.omissions
    assert (omission.name, omission.direction) == ("hf-eager", "forward+backward")
    assert omission.reason.endswith("minutes with more than 8")
    assert time.perf_counter() - start < 60


def test_torch_has_the_threads_of_the_run() -> None:
    before = torch.get_num_threads()
    with limit_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(modeling_mixtral, "MixtralExperts")
    found = BY_NAME["hf-eager"].availability()
    assert not found.ok
    assert found.reason == "needs transformers 5, whose experts are one tensor"


def test_missing_packages_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    found = BY_NAME["hf-grouped_mm"].availability()
    assert not found.ok
    assert found.reason.startswith("needs torch and transformers (")
