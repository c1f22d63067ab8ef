"""``npmoe bench``: options, what is printed and written, exit codes."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import assert_one_message, npmoe

from npmoe import benchmark, get_backend
from npmoe.backends import Availability, ReferenceBackend, registry
from npmoe.benchmark import run as run_module
from npmoe.benchmark.card_limits import CardLimits
from npmoe.benchmark.implementations import GradientArrays, build_backend
from npmoe.benchmark.limits import MeasuredLimits
from npmoe.cli import bench as command
from npmoe.testing import Report
from npmoe.testing.faults.backend import UnwrittenEmptyExperts

TINY = ["--case", "12,16,24,4,2", "--rounds", "2", "--threads", "1"]
NAME = "T12-H16-I24-E4-K2"


class Twin:
    """A peer that is the NumPy backend under another name."""

    name = "twin"

    def __init__(self, ok=True, not_timed=None):
        self.ok, self.not_timed = ok, not_timed or {}

    def availability(self):
        return Availability(self.ok, "" if self.ok else "needs twins")

    def build(self, inputs):
        import dataclasses

        one = build_backend(get_backend("numpy"), inputs, GradientArrays())
        return dataclasses.replace(one, name="twin", is_peer=True, not_timed=self.not_timed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure small limits, trust every backend, and know one peer."""

    def small(dtype, threads, **options):
        return MeasuredLimits(dtype, threads, gemm_size=32, read_bytes=4000, **options)

    def green(backend, *, name, **_):
        return Report(target=name, kind="backend", results=[], failures=[])

    def small_card(card, dtype, operands, **options):
        return CardLimits(card, dtype, operands, gemm_size=8, copy_bytes=4000, **options)

    monkeypatch.setattr(run_module, "MeasuredLimits", small)
    monkeypatch.setattr(run_module, "CardLimits", small_card)
    monkeypatch.setattr(run_module, "check_backend", green)
    monkeypatch.setattr(benchmark, "PEERS", (Twin(),))


def test_a_run(tmp_path):
    json_file, picture = tmp_path / "r.json", tmp_path / "r.png"
    backends = ["--backends", "numpy,reference"]
    result = npmoe("bench", *TINY, *backends, "--json", json_file, "--plot", picture)
    assert result.code == 0, result
    out = result.out
    assert f"\n{NAME}, forward: T=12 H=16 I=24 E=4 K=2, float32; " in out
    assert f"\n{NAME}, forward+backward: T=12 " in out
    assert out.count("\n  implementation ") == 2
    for name in ("numpy", "reference", "twin"):
        assert out.count(f"\n  {name} ") == 2
    assert "\nof limit: floor / median." in out
    assert ", 1 thread for every implementation\nnpmoe " in out
    assert out.splitlines()[-1] == (
        f"Timed numpy, reference against twin in {NAME} (forward, forward+backward)."
    )
    values = json.loads(json_file.read_text(encoding="utf-8"))
    assert values["settings"]["rounds"] == 2
    assert values["machine"]["threads"] == 1
    assert [c["direction"] for c in values["cases"]] == ["forward", "forward+backward"]
    for case in values["cases"]:
        assert case["rounds"] == 2
        assert {i["name"] for i in case["implementations"]} == {"numpy", "reference", "twin"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_choices():
    result = npmoe(
        *(
            "bench",
            *TINY,
            "--case",
            "5,8,6,4,1",
            "--direction",
            "forward",
            "--backends",
            "numpy, numpy",
        ),
        *("--peers", "none", "--dtype", "float64"),
    )
    assert result.code == 0
    assert result.out.count("\n  numpy ") == 2
    assert "reference" not in result.out
    assert "E=4 K=1, float64; " in result.out
    assert result.out.splitlines()[-1] == (
        f"Timed numpy against no peer in {NAME}, T5-H8-I6-E4-K1 (forward)."
    )


def test_the_default_cases_are_the_named_ones():
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    settings = command._settings(parser.parse_args([]))
    assert [case.name for case in settings.cases] == list(benchmark.CASES)
    assert settings.directions == benchmark.DIRECTIONS
    assert settings.threads == command.usable_cores()
    assert (settings.dtype, settings.weights, settings.rounds) == ("float32", "float32", 7)
    twice = command._settings(parser.parse_args(["--case", "train_small", "train_small"]))
    assert len(twice.cases) == 1


def test_the_default_backends_are_those_that_run_here_on_host_arrays(monkeypatch):
    here = {"numpy": True, "reference": False, "loopback": True}
    known = {name: Availability(ok, "") for name, ok in here.items()}
    monkeypatch.setattr(command, "available_backends", lambda: known)
    assert [backend.name for backend in command._backends(None, 1)] == ["numpy"]
    known["device"] = Availability(True)
    found = {"numpy": get_backend("numpy"), "device": get_backend("loopback")}
    monkeypatch.setattr(command, "get_backend", found.get)
    assert [backend.name for backend in command._backends(None, 1)] == ["numpy"]


def test_a_device(tmp_path):
    """The device that is not there, through everything that a GPU would go through."""
    json_file = tmp_path / "r.json"
    result = npmoe(
        *("bench", *TINY, "--backend", "loopback", "--peers", "none", "--json", json_file),
        *("--plot", tmp_path / "r.png"),
    )
    assert result.code == 0, result.err
    assert result.out.count("\n  loopback ") == 2
    assert "\nlimits: product of 8 in float32 with TF32 off, best of 3; copy of " in result.out
    assert "\nthe device of loopback\n" in result.out
    assert result.out.splitlines()[-1].startswith("Timed loopback against no peer in ")
    values = json.loads(json_file.read_text(encoding="utf-8"))
    assert values["machine"]["device"]["memory"].startswith("not measured: ")
    assert values["cases"][0]["implementations"][0]["memory"] == {"arrays": None, "resident": None}


def test_a_peer_of_devices_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = npmoe("bench", *TINY, "--backend", "loopback", "--peers", "triton-fused_moe")
    assert_one_message(
        result,
        "peer 'triton-fused_moe' cannot run here: needs torch (",
        "It needs a CUDA build of torch, and vllm or sglang.",
    )
    arguments = ["bench", *TINY, "--direction", "forward", "--backend", "loopback"]
    result = npmoe(*arguments)
    assert result.code == 0
    assert "not timed: torch-grouped_mm: needs torch (" in result.out


def test_precision_reaches_a_backend_that_has_the_option(monkeypatch):
    class Rounding(ReferenceBackend):
        def __init__(self, precision="float32"):
            self.operands = precision

    from npmoe.benchmark import threads

    monkeypatch.setattr(threads, "get_backend", lambda _, **options: Rounding(**options))
    (backend,) = command._backends("rounding", 1, "bfloat16")
    assert backend.operands == "bfloat16"


def test_modelled_bounds(tmp_path):
    json_file = tmp_path / "r.json"
    result = npmoe(
        *("bench", "--modelled", "A100", "rtx 4090", "--case", "train_small", "12,16,24,4,2"),
        *("--precision", "bfloat16", "--weights", "bfloat16", "--json", json_file),
    )
    assert result.code == 0, result.err
    tables = result.out.split("\n\n")
    assert len(tables) == 5
    for table in tables[:4]:
        assert table.startswith("MODELLED, not measured: ")
        assert "kernels of precision bfloat16, expert weights bfloat16; blocks of " in table
        assert [line.split()[0] for line in table.splitlines()[3:]] == ["A100", "RTX4090"]
    assert tables[4].startswith("MODELLED: nothing of this was measured.")
    values = json.loads(json_file.read_text(encoding="utf-8"))
    assert [c["card"]["name"] for c in values["cases"]] == 4 * ["A100", "RTX4090"]
    assert all(c["modelled"] for c in values["cases"])
    result = npmoe("bench", "--modelled", "--case", "train_small", "--direction", "forward")
    assert [line.split()[0] for line in result.out.splitlines()[3:9]] == list(benchmark.CARD_SHEETS)
    assert "kernels of precision float32, expert weights float32; " in result.out


def test_half_weights():
    result = npmoe(
        *("bench", *TINY, "--weights", "float16", "--backends", "numpy", "--peers", "none")
    )
    assert result.code == 0
    assert "K=2, float32, expert weights float16; " in result.out


def test_a_progress_line_names_what_runs():
    result = npmoe("bench", *TINY, "--backends", "numpy", "--peers", "none")
    assert result.code == 0
    assert "  0%|" in result.err
    assert "numpy: " not in result.out
    assert "%|" not in result.out


def test_the_bar_keeps_out_of_the_way_of_lines(capsys):
    bar = command._Bar()
    bar.print("before the bar")
    bar.update("first", 0.0)
    bar.update("second", 0.5)
    bar.print("a table")
    assert bar._bar.n == 0.5
    assert bar._bar.desc == "second"
    bar.close()
    assert capsys.readouterr().out == "before the bar\na table\n"


def test_a_backend_with_a_red_check(monkeypatch):
    def red(backend, *, name, **_):
        from types import SimpleNamespace

        failures = [SimpleNamespace(check="a-red-check")] * (name == "reference")
        return Report(target=name, kind="backend", results=[], failures=failures)

    monkeypatch.setattr(run_module, "check_backend", red)
    result = npmoe("bench", *TINY, "--direction", "forward", "--backends", "reference,numpy")
    assert result.code == 1
    refusal = "its conformance run is red: a-red-check"
    assert f"not timed: reference: {refusal}.\n" in result.out
    assert f"; refused or missing: reference ({refusal})." in result.out.splitlines()[-1]
    assert "\n  reference " not in result.out
    assert "\n  numpy " in result.out


def test_a_registered_backend_with_a_planted_mistake(monkeypatch, tmp_path):
    """By its name, with the real checks; nothing else is timed, so there is no picture."""
    from npmoe.testing import check_backend

    where = f"{UnwrittenEmptyExperts.__module__}:UnwrittenEmptyExperts"
    monkeypatch.setitem(registry._FIRST_PARTY, "faulty", where)
    monkeypatch.setattr(run_module, "check_backend", check_backend)
    picture, values = tmp_path / "r.png", tmp_path / "r.json"
    result = npmoe(
        *("bench", *TINY, "--backends", "faulty", "--peers", "none"),
        *("--plot", picture, "--json", values),
    )
    assert result.code == 1
    assert "not timed: unwritten-empty-experts: its conformance run is red: " in result.out
    assert "empty-experts-have-zero-gradient" in result.out
    assert result.out.splitlines()[-1].startswith("Timed nothing; refused or missing: ")
    assert not picture.exists()
    found = json.loads(values.read_text(encoding="utf-8"))
    assert found["complete"] is False
    assert "empty-experts-have-zero-gradient" in found["omissions"][0]["red_checks"]


def test_a_peer_that_is_missing_is_skipped_unless_it_is_named(monkeypatch):
    monkeypatch.setattr(benchmark, "PEERS", (Twin(ok=False),))
    arguments = ["bench", *TINY, "--direction", "forward", "--backends", "numpy"]
    result = npmoe(*arguments)
    assert result.code == 0
    assert "not timed: twin: needs twins.\n" in result.out
    assert result.out.splitlines()[-1].endswith("; skipped: twin (needs twins).")
    result = npmoe(*arguments, "--peers", "twin")
    assert_one_message(
        result,
        "npmoe bench: error: peer 'twin' cannot run here: needs twins. Run: pip install ",
    )
    assert result.out == ""


def test_a_named_peer_that_leaves_something_out_makes_the_run_incomplete(monkeypatch):
    monkeypatch.setattr(benchmark, "PEERS", (Twin(not_timed={"forward+backward": "minutes"}),))
    arguments = ["bench", *TINY, "--backends", "numpy"]
    assert npmoe(*arguments).code == 0
    result = npmoe(*arguments, "--peers", "twin")
    assert result.code == 1
    assert result.out.splitlines()[-1].endswith(
        f"; refused or missing: twin in {NAME} forward+backward (minutes)."
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "tran_small"], "case must be a known name or T,H,I,E,K, got 'tran_small'. Did"),
        (["--case", "1,2,3"], "case must hold five positive whole numbers T,H,I,E,K, got '1,2,3'."),
        (["--rounds", "0"], "--rounds must be at least 1, got 0."),
        (["--budget", "0"], "--budget must be positive and finite, got 0.0."),
        (["--budget", "nan"], "--budget must be positive and finite, got nan."),
        (["--threads", "0"], "--threads must lie in 1.."),
        (["--threads", "100000"], "got 100000. This process may use "),
        (["--backends", "numbda"], "backend must name a known backend, got 'numbda'."),
        (["--backends", "numpy,"], "--backends must be names with commas between, got 'numpy,'."),
        (
            ["--backends", "numpy,loopback"],
            "backends must all work on host arrays, or all on a device, got numpy beside loopback.",
        ),
        (
            ["--backend", "loopback", "--peers", "twin"],
            "got 'twin'. Known: torch-grouped_mm, triton-fused_moe, or none.",
        ),
        (
            ["--backends", "numpy", "--precision", "bfloat16"],
            "--precision must come with backends that have this option, got 'bfloat16' for 'numpy'",
        ),
        (
            ["--modelled", "RTX4090", "H1000"],
            "--modelled must name known cards, got 'H1000'. Did you mean 'H100'? Known: A100, RTX",
        ),
        (["--modelled", "--precision", "fp8"], "--precision must be one of float32, tf32, "),
        (["--modelled", "--dtype", "float64"], "--dtype must be float32 with --modelled, got fl"),
        (["--modelled", "--backends", "numpy"], "--backends must not come with --modelled, got "),
        (["--modelled", "--peers", "none"], "--peers must not come with --modelled, got 'none'."),
        (["--modelled", "--plot", "r.png"], "--plot must not come with --modelled, got 'r.png'."),
        (["--peers", "tween"], "--peers must name known peers, got 'tween'. Known: twin, or none."),
        (["--peers", ""], "--peers must be names with commas between, got ''."),
        (
            ["--weights", "float16", "--dtype", "float64"],
            "--weights float16 must come with --dtype float32, got float64. Sums are float32",
        ),
        (["--json", "gone/r.json"], "--json must name a file that can be written"),
        (["--plot", "gone/r.png"], "--plot must name a file that can be written, got gone/r.png."),
        (["--plot", "."], "--plot must name a file that can be written, got .. Make its folder"),
        (
            ["--case", "1,100000,100000,10000,1"],
            "case must fit into memory, got 'T1-H100000-I100000-E10000-K1', which needs about ",
        ),
    ],
)
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("npmoe.benchmark.memory.available_memory", lambda: 10**11, raising=True)
    result = npmoe("bench", *arguments)
    assert_one_message(result, "npmoe bench: error: ", words)
    assert "bench: error: bench: " not in result.err
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["threadpoolctl", "tqdm", "matplotlib"])
def test_missing_packages_are_named_before_the_work_starts(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = npmoe("bench", *TINY, "--plot", tmp_path / "r.png")
    assert_one_message(result, f"package {package} must be installed", "npmoe[cli]")
    assert result.out == ""


def test_bfloat16_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    result = npmoe("bench", *TINY, "--weights", "bfloat16")
    assert_one_message(result, "bfloat16 needs the package ml_dtypes")


def test_no_matplotlib_without_a_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--direction", "forward", "--backends", "numpy", "--peers", "none"]
    assert npmoe("bench", *TINY, *arguments).code == 0


def test_a_backend_that_cannot_run_here(monkeypatch):
    monkeypatch.setattr(registry, "_instances", {})
    unusable = classmethod(lambda _: Availability(False, "it is Monday"))
    monkeypatch.setattr(ReferenceBackend, "availability", unusable)
    result = npmoe("bench", *TINY, "--backends", "reference")
    assert_one_message(result, "backend 'reference' cannot run here: it is Monday. Usable now:")


def test_threads_reach_a_backend_that_has_the_option(monkeypatch):
    class Threaded(ReferenceBackend):
        def __init__(self, num_threads=7):
            self.num_threads = num_threads

    from npmoe.benchmark import threads

    monkeypatch.setattr(threads, "get_backend", lambda _, **options: Threaded(**options))
    (backend,) = command._backends("reference", 2)
    assert backend.num_threads == 2
