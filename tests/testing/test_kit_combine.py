"""check_combine: right functions pass, planted mistakes die by name, and no check is idle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe.testing.conformance.case import Effort
from npmoe.testing.conformance.combine import COMBINE, check_combine
from npmoe.testing.faults.combine import FAULTS

CHECKS = {check.name: check for check in COMBINE.checks}


def by_slots(rows, row_ids, topk_weights):
    out = np.zeros((len(row_ids), rows.shape[1]), rows.dtype)
    for k in range(row_ids.shape[1]):
        t = np.flatnonzero(row_ids[:, k] >= 0)
        out[t] += topk_weights[t, k, None] * rows[row_ids[t, k]]
    return out


def by_einsum(rows, row_ids, topk_weights):
    padded = np.concatenate([rows, np.zeros((1, rows.shape[1]), rows.dtype)])
    weights = np.where(row_ids < 0, 0, topk_weights)
    return np.einsum("tk,tkh->th", weights, padded[np.where(row_ids < 0, len(rows), row_ids)])


def by_tokens_in_float64(rows, row_ids, topk_weights):
    out = np.zeros((len(row_ids), rows.shape[1]), rows.dtype)
    for t in range(min(len(row_ids), 2000)):
        kept = row_ids[t] >= 0
        out[t] = topk_weights[t, kept].astype(float) @ rows[row_ids[t, kept]].astype(float)
    out[2000:] = by_slots(rows, row_ids[2000:], topk_weights[2000:])  # in time
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_functions_pass(dtype: str, seed: int) -> None:
    report = check_combine(by_slots, dtype=dtype, seed=seed, quick=dtype == "float64" and seed > 0)
    assert report.passed, str(report)
    for subject in (by_einsum, by_tokens_in_float64):
        report = check_combine(subject, dtype=dtype, seed=seed, quick=True)
        assert report.passed, str(report)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name_and_small(fault, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        report = check_combine(fault.subject, only=[fault.check], quick=True, seed=seed)
        assert [f.check for f in report.failures] == [fault.check]
    T, K = report.failures[0].case.arguments["row_ids"].shape
    assert K <= 4 or fault.check == "many-slots"
    assert T <= 4 or fault.check == "rows-beyond-16-bits"
    assert reproduces(report, tmp_path)
    assert not reproduces(report, tmp_path, target=f"{__name__}:by_slots")


def spoiled(**changed):
    """Return what calls `by_slots` and spoils something."""

    def subject(rows, row_ids, topk_weights):
        out = by_slots(rows, row_ids, topk_weights)
        return changed["change"](out, rows, row_ids, topk_weights)

    return subject


def wrong_when(condition):
    return spoiled(change=lambda out, *given: out + 1 if condition(*given) else out)


noise = np.random.default_rng(0)
IDLE_OTHERWISE = {
    "integers-are-exact": lambda rows, ids, w: by_slots(rows, ids, np.ones_like(w)),
    "within-rounding": lambda rows, ids, w: by_slots(rows, ids, w.astype("f2").astype(w.dtype)),
    "no-tokens": lambda rows, ids, w: by_slots(rows, ids[ids.max() * 0 :], w),
    "range-is-kept": lambda rows, ids, w: by_slots(np.clip(rows, -65504, 65504), ids, w),
    "square-is-not-transposed": lambda rows, ids, w: by_slots(
        rows, ids, w.T if w.shape[0] == w.shape[1] else w
    ),
    "edges-of-tiles": wrong_when(lambda rows, ids, w: rows.shape[1] in (127, 129, 255)),
    "same-bits-twice": spoiled(
        change=lambda out, *_: out + noise.standard_normal(out.shape, out.dtype)
    ),
    "read-only-inputs": wrong_when(lambda rows, *_: not rows.flags.writeable),
    "strided-inputs": wrong_when(lambda rows, *_: not rows.flags.c_contiguous),
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_can_fail(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [fault.subject for fault in FAULTS if fault.check == name]
    subject = IDLE_OTHERWISE[name] if name in IDLE_OTHERWISE else killed[0]
    with np.errstate(all="ignore"):
        report = check_combine(subject, only=[name], name=f"{__name__}:subject")
        assert not report.passed
        monkeypatch.setitem(globals(), "subject", subject)
        assert reproduces(report, tmp_path)


def test_mistakes_of_the_same_kinds_die_too() -> None:
    def into_zeros_of_rows(rows, row_ids, topk_weights):
        """Treat row 0 as none."""
        return by_slots(rows, np.where(row_ids <= 0, -1, row_ids), topk_weights)

    def means(rows, row_ids, topk_weights):
        """Divide by the number of rows."""
        count = np.maximum((row_ids >= 0).sum(axis=1, keepdims=True), 1)
        return (by_slots(rows, row_ids, topk_weights) / count).astype(rows.dtype)

    def bfloat16_sums(rows, row_ids, topk_weights):
        """Cut the sum to sixteen bits after every slot."""
        out = np.zeros((len(row_ids), rows.shape[1]), np.float32)
        for k in range(row_ids.shape[1]):
            part = by_slots(rows, row_ids[:, k : k + 1], topk_weights[:, k : k + 1])
            out = ((out + part).astype("f4").view("u4") & np.uint32(0xFFFF0000)).view("f4")
        return out.astype(rows.dtype)

    def sixteen_slots(rows, row_ids, topk_weights):
        """Add at most sixteen slots."""
        return by_slots(rows, row_ids[:, :16], topk_weights[:, :16])

    def weights_by_rank(rows, row_ids, topk_weights):
        """Move weights of kept slots to the front."""
        order = np.argsort(row_ids < 0, axis=1, kind="stable")
        return by_slots(rows, row_ids, np.take_along_axis(topk_weights, order, axis=1))

    wrong = (into_zeros_of_rows, means, bfloat16_sums, sixteen_slots, weights_by_rank)
    for subject in wrong:
        assert not check_combine(subject, quick=True, stop=True).passed, subject.__name__


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_small(dtype: str) -> None:
    rng = np.random.default_rng(5)
    for case in CHECKS["within-rounding"].cases(rng, Effort(cases=30, quick=False, dtype=dtype)):
        (want,) = COMBINE.expected(case)
        if want.value.any():
            assert want.bound.max() < 0.01 * np.abs(want.value).max()
