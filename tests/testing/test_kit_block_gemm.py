"""check_block_gemm: right functions pass, planted mistakes die by name, and no check is idle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit_reproducers import reproduces

from npmoe.testing.conformance.block_gemm import BLOCK_GEMM, check_block_gemm
from npmoe.testing.conformance.case import Effort
from npmoe.testing.conformance.draw import far_apart
from npmoe.testing.faults.block_gemm import FAULTS

CHECKS = {check.name: check for check in BLOCK_GEMM.checks}


def by_blocks(a, w, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None):
    R, total = len(a) * top_k, int(num_tokens_post_padded[0])
    out = np.full((R, w.shape[1]), np.nan, a.dtype)
    size = len(sorted_token_ids) // max(1, len(expert_ids))
    for b in range(total // size if total else 0):
        routes = sorted_token_ids[b * size : (b + 1) * size]
        routes = routes[routes < R]
        if expert_ids[b] < 0:
            out[routes] = 0
            continue
        out[routes] = a[routes // top_k] @ w[expert_ids[b]].T
        if topk_weights is not None:
            out[routes] *= topk_weights.ravel()[routes, None]
    return out


def by_rows(a, w, sorted_token_ids, expert_ids, num_tokens_post_padded, top_k, topk_weights=None):
    """All rows at once, weights on the input, in float64."""
    R, total = len(a) * top_k, int(num_tokens_post_padded[0])
    out = np.zeros((R, w.shape[1]), a.dtype)
    if not total:
        return out
    size = len(sorted_token_ids) // len(expert_ids)
    owner = np.repeat(expert_ids, size)[:total]
    routes = sorted_token_ids[:total]
    here = (routes < R) & (owner >= 0)
    routes, owner = routes[here], owner[here]
    x = a[routes // top_k].astype(np.float64)
    if topk_weights is not None:
        x = x * topk_weights[routes // top_k, routes % top_k, None]
    out[routes] = np.einsum("rn,rmn->rm", x, w[owner])
    return out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_functions_pass(dtype: str, seed: int) -> None:
    report = check_block_gemm(by_blocks, dtype=dtype, seed=seed, quick=dtype == "float64")
    assert report.passed, str(report)
    report = check_block_gemm(by_rows, dtype=dtype, seed=seed, quick=True)
    assert report.passed, str(report)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_planted_mistakes_die_by_name_and_small(fault, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        report = check_block_gemm(fault.subject, only=[fault.check], quick=True, seed=seed)
        assert [f.check for f in report.failures] == [fault.check]
    case = report.failures[0].case
    large = fault.check in ("routes-beyond-16-bits", "every-block-size")
    assert len(case.options["topk_ids"]) <= 4 or large
    assert len(case.arguments["w"]) <= 4
    assert reproduces(report, tmp_path)
    assert not reproduces(report, tmp_path, target=f"{__name__}:by_blocks")


def wrong_when(condition):
    def subject(*given):
        out = by_blocks(*given)
        return np.nan_to_num(out) + 1 if condition(*given) else out

    return subject


def without_weights(*given):
    return by_blocks(*given[:6])


def expert_in_a_byte(a, w, rows, experts, *rest):
    return by_blocks(a, w, rows, np.where(experts < 0, -1, experts % 256), *rest)


def clipped(a, *rest):
    return by_blocks(np.clip(a, -65504, 65504), *rest)


def shaky(*given):
    out = by_blocks(*given)
    return out + noise.standard_normal(out.shape, out.dtype)


def descending(a, w, rows, experts, total, top_k, *rest):
    R = len(a) * top_k
    size = max(1, len(rows) // max(1, len(experts)))
    table = rows[: int(total[0])].reshape(-1, size)
    return any((np.diff(block[block < R]) < 0).any() for block in table)


def offsets_in_32_bits(a, w, rows, experts, total, top_k, *weights):
    """Compute where a token begins in the type of its number."""
    routes = np.arange(len(a) * top_k, dtype=np.int32)
    step, column = (n // a.itemsize for n in a.strides)
    length = (len(a) - 1) * step + (a.shape[1] - 1) * column + 1
    flat = np.lib.stride_tricks.as_strided(a, (length,), (a.itemsize,))
    start = routes * np.int32(step)
    return by_blocks(flat[start[:, None] + np.arange(a.shape[1])], w, rows, experts, total, top_k)


NO_ROOM = far_apart(np.zeros((1, 1)), np.zeros((1, 1))) is None
noise = np.random.default_rng(0)
IDLE_OTHERWISE = {
    "integers-are-exact": wrong_when(lambda *_: True),
    "within-rounding": lambda a, *rest: by_blocks(a.astype("f2").astype(a.dtype), *rest),
    "weights-are-of-routes": without_weights,
    "experts-in-any-order": lambda a, w, rows, experts, *rest: by_blocks(
        a, w, rows, np.sort(experts), *rest
    ),
    "routes-in-no-block": lambda a, w, rows, experts, total, top_k, *rest: by_blocks(
        a[np.isfinite(a).all(axis=1)], w, rows, experts, total, top_k, *rest
    ),
    "order-in-blocks-is-free": wrong_when(descending),
    "no-tokens": wrong_when(lambda a, *_: 1 // len(a) < 0),
    "more-experts-than-a-block": expert_in_a_byte,
    "edges-of-tiles": wrong_when(lambda a, *_: a.shape[1] in (31, 65, 127)),
    "offsets-beyond-32-bits": offsets_in_32_bits,
    "range-is-kept": clipped,
    "same-bits-twice": shaky,
    "read-only-inputs": wrong_when(lambda a, *_: not a.flags.writeable),
    "strided-inputs": wrong_when(lambda a, *_: not a.flags.c_contiguous),
}


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_can_fail(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "offsets-beyond-32-bits" and NO_ROOM:
        pytest.skip("this system does not lend memory that is not there")
    killed = [fault.subject for fault in FAULTS if fault.check == name]
    subject = IDLE_OTHERWISE[name] if name in IDLE_OTHERWISE else killed[0]
    monkeypatch.setitem(globals(), "subject", subject)
    with np.errstate(all="ignore"):
        report = check_block_gemm(subject, only=[name], name=f"{__name__}:subject", quick=True)
        assert not report.passed
        assert reproduces(report, tmp_path)


def test_mistakes_of_the_same_kinds_die_too() -> None:
    def routes_modulo_tokens(a, w, rows, experts, total, top_k, *weights):
        """Lay out routes slot after slot instead of token after token."""
        R, T = len(a) * top_k, max(1, len(a))
        moved = np.where(rows < R, rows % T * top_k + rows // T, rows)
        return by_blocks(a, w, moved, experts, total, top_k, *weights)

    def drops_the_last_block(a, w, rows, experts, total, *rest):
        size = len(rows) // max(1, len(experts))
        return by_blocks(a, w, rows, experts, total - size, *rest)

    def weights_twice(a, w, rows, experts, total, top_k, weights=None):
        squared = None if weights is None else weights * weights
        return by_blocks(a, w, rows, experts, total, top_k, squared)

    def sentinel_by_row_count(a, w, rows, experts, total, top_k, *weights):
        """Take the length of the buffer for the sentinel."""
        kept = np.where(rows == len(rows), len(a) * top_k, np.minimum(rows, len(a) * top_k - 1))
        return by_blocks(a, w, kept, experts, total, top_k, *weights)

    def neighbours_expert(a, w, rows, experts, *rest):
        return by_blocks(a, w, rows, np.where(experts > 0, experts - 1, experts), *rest)

    def sums_over_tokens(a, w, rows, experts, total, top_k, *weights):
        out = by_blocks(a, w, rows, experts, total, top_k, *weights)
        return out.reshape(len(a), top_k, -1).sum(axis=1) if len(a) else out

    wrong = (routes_modulo_tokens, drops_the_last_block, weights_twice, sentinel_by_row_count)
    for subject in (*wrong, neighbours_expert, sums_over_tokens):
        assert not check_block_gemm(subject, quick=True, stop=True).passed, subject.__name__


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_small(dtype: str) -> None:
    rng = np.random.default_rng(5)
    for case in CHECKS["within-rounding"].cases(rng, Effort(cases=30, quick=False, dtype=dtype)):
        (want,) = BLOCK_GEMM.expected(case)
        assert not want.free.any()
        assert want.bound.max() < 0.01 * np.abs(want.value).max()
