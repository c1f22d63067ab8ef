"""check_experts and check_experts_backward: our own pass, every planted mistake dies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit_runs import assert_dies, experts_subjects, loose_bounds, uncaught

from npmoe.testing.conformance.experts import (
    EXPERTS,
    EXPERTS_BACKWARD,
    check_experts,
    check_experts_backward,
)
from npmoe.testing.faults.experts import FAULTS

CHECKS = {"experts": check_experts, "experts_backward": check_experts_backward}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("backend", "dtype"), [("numpy", "float32"), ("reference", "float64")])
def test_our_own_pass(backend: str, dtype: str, seed: int) -> None:
    forward, backward = experts_subjects(backend)
    for check, fn in ((check_experts, forward), (check_experts_backward, backward)):
        report = check(fn, dtype=dtype, seed=seed, quick=True)
        assert report.passed, str(report)
        assert all(r.cases for r in report.results)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_dies_by_name(fault: object, seed: int, tmp_path: Path) -> None:
    report = CHECKS[fault.kind](fault.subject, only=[fault.check], quick=True, seed=seed)
    assert_dies(fault, report, tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [EXPERTS, EXPERTS_BACKWARD], ids=lambda k: k.name)
def test_bounds_are_below_one_percent(kind: object, dtype: str) -> None:
    assert loose_bounds(kind, dtype, seed=5) == []


def test_every_check_can_fail() -> None:
    forward, backward = experts_subjects("reference")
    assert uncaught(EXPERTS, check_experts, forward) == []
    assert uncaught(EXPERTS_BACKWARD, check_experts_backward, backward) == []


def test_integer_cases_leave_no_rounding() -> None:
    """The sum of absolute values of everything stays below the 24 bits of float32."""
    for kind, fn in zip((EXPERTS, EXPERTS_BACKWARD), experts_subjects("reference"), strict=True):
        for check in kind.checks:
            for case in check.cases(np.random.default_rng(1), effort(dtype="float64")):
                if case.options["exact"]:
                    sizes = {
                        n: np.abs(a) if a.dtype.kind == "f" else a
                        for n, a in case.arguments.items()
                    }
                    outputs = fn(*sizes.values())
                    for output in outputs if isinstance(outputs, tuple) else (outputs,):
                        # Weights are multiples of 1/2.
                        assert 2 * np.abs(output).max(initial=0) < 2**24, (check.name, case.note)


def effort(dtype: str) -> object:
    from npmoe.testing.conformance.case import Effort

    return Effort(cases=30, quick=False, dtype=dtype)


def test_mistakes_in_no_list_die_too() -> None:
    forward, backward = experts_subjects("reference")

    def averages(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w: np.ndarray, ids: np.ndarray):
        return forward(x, w1, w2, w / ids.shape[1], ids)

    def normalizes(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w: np.ndarray, ids: np.ndarray):
        total = np.where(ids >= 0, w, 0).sum(axis=1, keepdims=True)
        return forward(x, w1, w2, np.where(total > 0, w / np.where(total > 0, total, 1), 0), ids)

    def sorts_tokens(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w: np.ndarray, ids: np.ndarray):
        out = forward(x, w1, w2, w, ids)
        return out[np.argsort(ids[:, 0], kind="stable")] if len(ids) else out

    def means(g: np.ndarray, x: np.ndarray, *rest: np.ndarray):
        grads = backward(g, x, *rest)
        return grads[0], grads[1] / max(1, len(x)), grads[2] / max(1, len(x)), grads[3]

    def clips(g: np.ndarray, *rest: np.ndarray):
        return tuple(np.clip(a, -1, 1) for a in backward(g, *rest))

    for wrong in (averages, normalizes, sorts_tokens):
        assert not check_experts(wrong, quick=True, stop=True).passed, wrong.__name__
    for wrong in (means, clips):
        assert not check_experts_backward(wrong, quick=True, stop=True).passed, wrong.__name__
