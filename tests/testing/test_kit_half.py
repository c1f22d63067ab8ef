"""check_backend with expert weights in half precision: what is drawn, run and refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe import BackendUnavailableError, MoEConfig, RangeError
from npmoe._half import HALF_DTYPES, is_half, named_dtype
from npmoe.testing import parametrize_with_checks
from npmoe.testing.conformance.backend import backend_kind, check_backend
from npmoe.testing.conformance.case import FLOATS, Case, Check, Effort
from npmoe.testing.conformance.half_cases import round_weights
from npmoe.testing.conformance.recipes import problem_of
from npmoe.testing.faults.half import FAULTS, BrainAsFloat16, HalfGradients
from npmoe.testing.faults.matrix import kill_matrix
from npmoe.testing.problems import make_problem
from npmoe.tree import named_arrays

KIND = backend_kind(fused=True)
OWN = (
    "half-weights-are-read-exactly",
    "activations-are-not-rounded",
    "sums-are-float32",
    "gradients-are-float32",
)
MATRICES = ("gate_up_proj", "down_proj", "weight")
CFG = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=3, top_k=2, expert_bias=True)
halves = pytest.mark.parametrize("half", HALF_DTYPES)


def cases_of(check: Check, half: str | None, seed: int = 0, cases: int = 30) -> list[Case]:
    if half is not None:
        named_dtype("test", half, "test")
    effort = Effort(cases=cases, quick=cases < 30, dtype="float32", half=half)
    return list(check.cases(np.random.default_rng(seed), effort))


def arrays_of(case: Case) -> dict[str, np.ndarray]:
    if "recipe" in case.arguments and len(case.arguments) == 2:
        return dict(named_arrays(problem_of(case["recipe"]).params))
    return {n: a for n, a in case.arguments.items() if isinstance(a, np.ndarray)}


# What is drawn.


@halves
@pytest.mark.parametrize(
    "check", [c for c in KIND.checks if "float16" in c.dtypes], ids=lambda c: c.name
)
def test_expert_weights_are_half_and_all_else_is_float32(check: Check, half: str) -> None:
    seen = 0
    for case in cases_of(check, half, cases=6):
        for name, array in arrays_of(case).items():
            if array.dtype.kind in "iub":
                continue
            assert str(array.dtype) == (half if name in MATRICES else "float32"), name
            seen += is_half(array.dtype)
    assert seen


def test_float_cases_have_no_half_numbers() -> None:
    for check in KIND.checks:
        if check.name not in OWN:
            for case in cases_of(check, None, cases=6):
                assert not any(is_half(a.dtype) for a in arrays_of(case).values())


def read_numbers(half: str, field: str) -> np.ndarray:
    """Return the sizes of all numbers that the check of exact reading draws."""
    check = next(c for c in KIND.checks if c.name == OWN[0])
    found = [c.arguments[field] for c in cases_of(check, half) if field in c.arguments]
    return np.abs(np.concatenate([a.astype(np.float64).ravel() for a in found]))


@pytest.mark.parametrize("field", MATRICES)
def test_float16_subnormals_and_the_largest_are_read(field: str) -> None:
    drawn = read_numbers("float16", field)
    assert {2.0**-24, 1023 * 2.0**-24, 2.0**-14, 65504.0} <= set(drawn)
    assert len(set(drawn[(drawn > 0) & (drawn < 2.0**-14)])) > 10
    assert np.isfinite(drawn).all()


@pytest.mark.parametrize("field", MATRICES)
def test_bfloat16_reads_beyond_float16(field: str) -> None:
    drawn = read_numbers("bfloat16", field)
    large = round_weights(np.array([1e38, 3.3895e38]), "bfloat16").astype(np.float64)
    assert set(large) <= set(drawn)
    assert len(set(drawn[drawn > 65504])) > 10
    assert len(set(drawn[(drawn > 0) & (drawn < 2.0**-24)])) > 10
    assert np.isfinite(drawn).all()


@halves
@pytest.mark.parametrize(
    ("check", "field"),
    [
        ("verb-grouped-gemm", "weight"),
        ("experts-fused", "gate_up_proj"),
        ("experts-fused", "down_proj"),
        ("layer-backward", "gate_up_proj"),
    ],
)
def test_weights_are_tiny_and_large_in_turn(check: str, field: str, half: str) -> None:
    cases = cases_of(next(c for c in KIND.checks if c.name == check), half)
    sizes = [np.nanmax(np.abs(arrays_of(c)[field].astype(np.float64)), initial=0) for c in cases]
    least, most = {"float16": (2.0**-14, 2.0**10), "bfloat16": (2.0**-30, 2.0**30)}[half]
    assert sum(0 < s < least for s in sizes) > 2
    assert sum(s > most for s in sizes) > 2
    assert sum(0.1 < s < 10 for s in sizes) > 2


# What is run.


def test_checks_that_meet_no_weights_are_left_to_float32() -> None:
    report = check_backend("numpy", dtype="float16", quick=True, only=[])
    assert report.known == tuple(c.name for c in KIND.checks if "float16" in c.dtypes)
    assert set(OWN) < set(report.known)
    assert not {"verb-linear", "verb-route", "ties-go-to-the-lowest-expert"} & set(report.known)
    assert report.notes == [
        "expert weights in float16, all else float32; what they do not meet is left to float32."
    ]
    plain = check_backend("numpy", quick=True, only=[])
    assert not set(OWN) & set(plain.known)
    assert not plain.notes
    for check in KIND.checks:
        assert set(check.dtypes) in ({*FLOATS}, {*FLOATS, *HALF_DTYPES}, {*HALF_DTYPES})


def test_pytest_runs_the_same_checks() -> None:
    mark = parametrize_with_checks(["reference"], dtype="bfloat16", quick=True)
    names = [str(param.values[0]) for param in mark.args[1]]
    assert names == [
        f"backend-{c.name}" for c in backend_kind(fused=False).checks if "bfloat16" in c.dtypes
    ]
    mark.args[1][-1].values[0]()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_float32_does_not_show_the_faults(fault: Any) -> None:
    names = ["verb-grouped-gemm", "experts-composed", "layer-backward"]
    assert check_backend(fault.subject, quick=True, only=names).passed


def test_the_faults_meet_every_check_of_half_precision_alone() -> None:
    assert {f.check for f in FAULTS} == set(OWN)


@halves
def test_half_gradients_are_told_by_their_dtype(half: str) -> None:
    report = check_backend(HalfGradients, dtype=half, quick=True, only=[OWN[3]])
    assert report.failures[0].message == f"output 1 must have dtype float32, got {half}."


def test_a_script_gives_the_target_bfloat16(tmp_path: Path) -> None:
    report = check_backend(BrainAsFloat16, dtype="bfloat16", quick=True, only=[OWN[0]])
    right = "npmoe.testing.conformance.backend_probe:probe('reference')"
    assert reproduces(report, tmp_path)
    assert not reproduces(report, tmp_path, target=right)


# What is refused.


def test_dtypes_and_names_that_make_no_sense() -> None:
    for settings, text in (
        (
            {"dtype": "float8"},
            "dtype must be 'float32', 'float64', 'float16' or 'bfloat16', got 'float8'.",
        ),
        (
            {"dtype": "float16", "only": ["verb-add"]},
            "check must be a known name, got 'verb-add'. Known for float16: verb-grouped-gemm, ",
        ),
        ({"only": [OWN[0]]}, f"check must be a known name, got {OWN[0]!r}. Known for float32: "),
        ({"dtype": "float16", "only": ["x"]}, "check must be a known name, got 'x'. Known: verb-"),
    ):
        with pytest.raises(RangeError) as caught:
            check_backend("numpy", quick=True, **settings)
        assert str(caught.value).startswith(f"check_backend: {text}")


def test_a_ledger_may_name_checks_of_other_dtypes() -> None:
    known = {"verb-add": "not run here"}
    report = check_backend(
        "numpy", dtype="float16", quick=True, only=[OWN[3]], expected_failed_checks=known
    )
    assert report.passed


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    for name, call in (
        ("check_backend", lambda: check_backend("numpy", dtype="bfloat16")),
        ("kill_matrix", lambda: next(kill_matrix())),
        (
            "make_problem",
            lambda: make_problem(CFG, num_tokens=1, dtype="float32", expert_dtype="bfloat16"),
        ),
    ):
        with pytest.raises(BackendUnavailableError) as caught:
            call()
        assert str(caught.value) == (
            f"{name}: bfloat16 needs the package ml_dtypes, which is not installed. Install it "
            "with: pip install 'npmoe[test]'."
        )


@halves
@pytest.mark.parametrize("layout", ["contiguous", "read_only", "strided", "reversed", "fortran"])
def test_problems_round_the_same_values(layout: Any, half: str) -> None:
    keywords: dict[str, Any] = {"num_tokens": 3, "dtype": "float32", "layout": layout}
    plain = make_problem(CFG, **keywords)
    stored = make_problem(CFG, **keywords, expert_dtype=half)
    assert f"expert_dtype='{half}'" in repr(stored)
    for name, array in named_arrays(plain.params):
        got = getattr(stored.params, name)
        want = array.astype(half) if name in MATRICES else array
        assert got.dtype == want.dtype
        assert got.strides == tuple(s * got.itemsize // array.itemsize for s in array.strides)
        np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize(("half", "dtype"), [("float16", "float64"), ("float32", "float32")])
def test_problems_have_half_weights_beside_float32(half: str, dtype: str) -> None:
    with pytest.raises(RangeError) as caught:
        make_problem(CFG, num_tokens=1, dtype=dtype, expert_dtype=half)
    assert str(caught.value) == (
        "make_problem: expert_dtype must be None, or 'float16' or 'bfloat16' with dtype "
        f"'float32', got {half!r} with {dtype!r}."
    )
