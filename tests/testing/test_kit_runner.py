"""The kit itself: what is a finding, how cases shrink, what is written down, what never crashes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from npmoe import BackendUnavailableError, RangeError
from npmoe.testing.conformance.case import Case, Effort, Expected, Finding, compare
from npmoe.testing.conformance.gemm import (
    GROUPED_GEMM,
    GROUPED_GEMM_WGRAD,
    check_grouped_gemm,
    check_grouped_gemm_wgrad,
)
from npmoe.testing.conformance.isolate import IsolatedTarget
from npmoe.testing.conformance.registry import KINDS, check_function, kind_of
from npmoe.testing.conformance.runner import run_checks
from npmoe.testing.conformance.targets import TargetNotUsable, check_arguments, load_target
from npmoe.testing.faults.gemm import FAULTS

ROOT = Path(__file__).parents[2]


def right(x_sorted, w, expert_offsets):
    y = np.zeros((len(x_sorted), w.shape[1]), x_sorted.dtype)
    for e in range(len(w)):
        rows = slice(expert_offsets[e], expert_offsets[e + 1])
        y[rows] = x_sorted[rows] @ w[e].T
    return y


def right_wgrad(x_sorted, grad_y, expert_offsets):
    return np.stack([grad_y[a:b].T @ x_sorted[a:b] for a, b in itertools.pairwise(expert_offsets)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_functions_pass(dtype: str, seed: int) -> None:
    for check, subject in ((check_grouped_gemm, right), (check_grouped_gemm_wgrad, right_wgrad)):
        report = check(subject, dtype=dtype, seed=seed)
        assert report.passed, str(report)
        assert not report.failures
        assert all(r.status == "passed" and r.cases > 0 for r in report.results)
        assert "WRONG" not in str(report)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name(fault) -> None:
    report = check_function(fault.kind)(fault.subject, quick=True, only=[fault.check])
    assert [f.check for f in report.failures] == [fault.check]
    case = report.failures[0].case
    if fault.check not in ("more-experts-than-a-block", "edges-of-tiles"):
        assert len(case.arguments["x_sorted"]) <= 4
        assert len(case.arguments["expert_offsets"]) <= 5


def wrong_shape(x, w, o):
    return right(x, w, o).T


def two_values(x, w, o):
    return right(x, w, o), 1


def nothing(x, w, o):
    return None


def text(x, w, o):
    return "y"


def other_dtype(x, w, o):
    return right(x, w, o).astype(np.float16)


def raises(x, w, o):
    raise ValueError("no such luck\nand more")


def says_nothing(x, w, o):
    raise KeyError


def exits(x, w, o):
    sys.exit(3)


def writes(x, w, o):
    y = right(x, w, o)
    x *= 0 if x.flags.writeable else 1
    return y


BAD = [
    (wrong_shape, "output must have shape "),
    (two_values, "the call must return 1 values, got 2 of them."),
    (nothing, "output must be a numeric array, got NoneType."),
    (text, "output must be a numeric array, got str."),
    (other_dtype, "output must have dtype float32, got float16."),
    (raises, "the call must return, got ValueError: no such luck"),
    (says_nothing, "the call must return, got KeyError"),
    (exits, "the call must return, got SystemExit: 3"),
    (writes, "argument x_sorted must come back unchanged, it was written to."),
]


@pytest.mark.parametrize(("subject", "words"), BAD, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_wrong_before_any_number(subject, words: str) -> None:
    report = check_grouped_gemm(subject, quick=True, only=["integers-are-exact"])
    assert not report.passed
    assert report.failures[0].message.startswith(words), report.failures[0].message
    assert "integers-are-exact" in str(report)


def test_random_results_are_not_repeatable() -> None:
    rng = np.random.default_rng(0)

    def shaky(x, w, o):
        return right(x, w, o) + rng.random((len(x), w.shape[1])).astype(x.dtype)

    report = check_grouped_gemm(shaky, quick=True, only=["same-bits-twice"])
    assert "must be the same bits in a second call" in report.failures[0].message


def test_a_case_shrinks_without_changing_what_fails() -> None:
    wrong = []

    def picky(x, w, o):
        if wrong and len(x) < 3:
            raise RuntimeError("too few rows")
        y = right(x, w, o)
        if len(x) > 2:
            y[2] += 1
            wrong.append(len(x))
        return y

    report = check_grouped_gemm(picky, only=["integers-are-exact"])
    failure = report.failures[0]
    assert failure.message.startswith("output[2, 0] must be ")
    shapes = [np.shape(v) for v in failure.case.arguments.values()]
    assert shapes == [(3, 1), (2, 1, 1), (3,)]


def test_nan_never_passes() -> None:
    want = Expected(value=np.zeros(2), bound=np.full(2, np.inf))
    compare((np.array([1e30, -5.0]),), (want,))
    with pytest.raises(Finding, match=r"output\[1\] must be 0.0 within inf, got nan; 1 of 2"):
        compare((np.array([0.0, np.nan]),), (want,))
    free = Expected(value=np.zeros(2), free=np.array([False, True]))
    compare((np.array([-0.0, np.nan]),), (free,))
    with pytest.raises(Finding):
        compare((np.array([1e-300, 0.0]),), (Expected(value=np.zeros(2)),))


def test_a_ledger_is_strict() -> None:
    known = {"integers-are-exact": "known since ever"}
    report = check_grouped_gemm(
        wrong_shape, quick=True, only=list(known), expected_failed_checks=known
    )
    assert report.passed
    assert report.results[0].status == "expected failure"
    assert not report.failures
    report = check_grouped_gemm(right, quick=True, only=list(known), expected_failed_checks=known)
    assert not report.passed
    assert report.results[0].status == "unexpected pass"
    assert report.results[0].message == "the ledger says it fails: known since ever"


def test_settings_that_make_no_sense() -> None:
    for settings, words in (
        ({"only": ["integer"]}, "check must be a known name, got 'integer'. Known: integers-are"),
        ({"expected_failed_checks": {"x": "y"}}, "check must be a known name, got 'x'."),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64', got 'float16'."),
        ({"seed": -1}, "seed must be an integer >= 0, got -1."),
    ):
        with pytest.raises(RangeError) as caught:
            check_grouped_gemm(right, **settings)
        assert str(caught.value).startswith(f"check_grouped_gemm: {words}")
    with pytest.raises(RangeError, match="array must be one of 'numpy', 'torch', 'cupy' or a func"):
        check_grouped_gemm(right, array="tensor")


def test_a_missing_array_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendUnavailableError) as caught:
        check_grouped_gemm(right, array="cupy")
    assert str(caught.value) == (
        "check: package cupy must be installed for array='cupy', got none."
    )


def test_stop_after_the_first_failure() -> None:
    report = check_grouped_gemm(wrong_shape, quick=True, stop=True)
    assert [r.status for r in report.results][:2] == ["failed", "not run"]
    assert len(report.failures) == 1
    seen: list[str] = []
    check_grouped_gemm(right, quick=True, progress=seen.append)
    assert seen == [c.name for c in GROUPED_GEMM.checks]


def test_arrays_of_another_kind_come_and_go() -> None:
    class Boxed:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values
            self.shape = values.shape

        def __dlpack__(self, **options):
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    def boxed(x, w, o):
        assert isinstance(x, Boxed)
        return Boxed(right(x.values, w.values, o.values))

    names = [n for n in (c.name for c in GROUPED_GEMM.checks) if n != "read-only-inputs"]
    report = check_grouped_gemm(boxed, quick=True, array=Boxed, only=names)
    assert report.passed, str(report)


def test_the_script_fails_alone_and_passes_when_mended(tmp_path: Path) -> None:
    broken = (
        "import numpy as np\n"
        "def product(x, w, o):\n"
        "    return np.zeros((len(x), w.shape[1]), x.dtype)\n"
    )
    (tmp_path / "theirs.py").write_text(broken, encoding="utf-8")
    sys.path.insert(0, str(tmp_path))
    try:
        report = check_grouped_gemm(load_target("theirs:product"), quick=True)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("theirs")
    scripts = report.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["passed"] is False
    assert [s.stem for s in scripts] == [f.check for f in report.failures]

    def run() -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, str(scripts[0])]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=env, check=False
        )

    failed = run()
    assert failed.returncode == 1
    assert "AssertionError: output 0: got" in failed.stderr
    mended = broken + (
        "def product(x, w, o):\n"
        "    y = np.zeros((len(x), w.shape[1]), x.dtype)\n"
        "    for e in range(len(w)):\n"
        "        y[o[e]:o[e + 1]] = x[o[e]:o[e + 1]] @ w[e].T\n"
        "    return y\n"
    )
    (tmp_path / "theirs.py").write_text(mended, encoding="utf-8")
    assert run().returncode == 0
    lines = scripts[0].read_text(encoding="utf-8").splitlines()
    assert "npmoe" not in "".join(lines)


def test_targets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text("def f(a, b): return a\nx = 3\n", encoding="utf-8")
    (tmp_path / "bad.py").write_text("1/0\n", encoding="utf-8")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(2)\n", encoding="utf-8")
    assert load_target("good.py:f")(1, 2) == 1
    for target, words in (
        ("good", "target must be 'module:function', got 'good'."),
        ("good.py:g", "good.py must hold 'g', got only: f, x."),
        ("good.py:x", "good.py:x must be callable, got int."),
        ("bad.py:f", "bad.py must be importable, got ZeroDivisionError: division by zero."),
        ("exits.py:f", "exits.py must be importable, got SystemExit: 2."),
        ("gone.py:f", "gone.py must be importable, got FileNotFoundError: no file gone.py."),
        ("no_such_module:f", "no_such_module must be importable, got ModuleNotFoundError: "),
    ):
        with pytest.raises(TargetNotUsable) as caught:
            load_target(target)
        assert str(caught.value).startswith(words)
    with pytest.raises(
        TargetNotUsable, match=r"the function must take \(a, b, c\), got \(a, b\): "
    ):
        check_arguments(load_target("good.py:f"), ("a", "b", "c"))


def test_kinds_by_arguments_or_name() -> None:
    assert kind_of(right) == "grouped_gemm"
    assert kind_of(right_wgrad) == "grouped_gemm_wgrad"

    def short(topk_ids, block_size, num_experts):
        return topk_ids

    assert kind_of(short) == "align"

    def my_experts_backward(*args):
        return args

    def my_product(a, b):
        return a

    assert kind_of(my_experts_backward) == "experts_backward"
    with pytest.raises(RangeError, match=r"^check: the kind must be clear from .*'my_product'"):
        kind_of(my_product)
    with pytest.raises(RangeError, match="kind must be a known name, got 'gemm'"):
        check_function("gemm")
    assert len({arguments for _, arguments in KINDS.values()}) == len(KINDS)


# Isolation.

THEIRS = """
import os, time
import numpy as np

def right(x, w, o):
    y = np.zeros((len(x), w.shape[1]), x.dtype)
    for e in range(len(w)):
        y[o[e]:o[e + 1]] = x[o[e]:o[e + 1]] @ w[e].T
    return y

def hangs(x, w, o):
    time.sleep(60)

def dies(x, w, o):
    os.abort()

def leaves(x, w, o):
    os._exit(3)

def exits(x, w, o):
    print("usage")
    raise SystemExit("not like this")

def writes(x, w, o):
    y = right(x, w, o)
    x[...] = 0
    return y

def fails(x, w, o):
    raise OSError("out of luck")
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("right", None),
        ("hangs", "the call must return, got Hang: no answer within 0.3 s"),
        ("dies", "the call must return, got Died: the process died by SIGABRT"),
        ("leaves", "the call must return, got Died: the process ended with code 3"),
        ("exits", "the call must return, got TargetError: SystemExit: not like this"),
        ("writes", "argument x_sorted must come back unchanged, it was written to."),
        ("fails", "the call must return, got TargetError: OSError: out of luck"),
    ],
)
def test_a_child_process_takes_the_blow(
    name: str, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child_target.py").write_text(THEIRS, encoding="utf-8")
    monkeypatch.setattr("npmoe.testing.conformance.runner._SHRINKS", 1)
    target = IsolatedTarget(f"child_target:{name}", seconds=0.3 if name == "hangs" else 20.0)
    start = time.perf_counter()
    try:
        names = ["integers-are-exact"] if words else None
        report = check_grouped_gemm(target, quick=True, only=names)
    finally:
        target.close()
    if words is None:
        assert report.passed, str(report)
    else:
        assert report.failures[0].message.startswith(words), report.failures[0].message
    assert time.perf_counter() - start < 60


def test_bounds_are_below_one_percent() -> None:
    """A check cannot pass by being loose."""
    for kind in (GROUPED_GEMM, GROUPED_GEMM_WGRAD):
        check = next(c for c in kind.checks if c.name == "within-rounding")
        for dtype in ("float32", "float64"):
            effort = Effort(cases=20, quick=False, dtype=dtype)
            for case in check.cases(np.random.default_rng(0), effort):
                for want in kind.expected(case):
                    if want.value.size and want.value.any():
                        assert want.bound is not None
                        assert want.bound.max() < 0.01 * np.abs(want.value).max()


def test_a_check_sees_its_own_cases() -> None:
    """Two checks of one kind draw from streams of their own, the same in every run."""
    kind = GROUPED_GEMM
    calls: list[bytes] = []

    def spy(x, w, o):
        calls.append(x.tobytes())
        return right(x, w, o)

    run_checks(kind, spy, quick=True, only=["within-rounding"])
    first = list(calls)
    calls.clear()
    run_checks(kind, spy, quick=True, only=["integers-are-exact", "within-rounding"])
    assert calls[-len(first) :] == first
    case = Case(arguments={"a": np.ones(2)}, note="", options={})
    assert case.replace(a=np.zeros(2)).arguments["a"].tolist() == [0.0, 0.0]
