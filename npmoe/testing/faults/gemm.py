"""Mistakes in grouped products."""

from __future__ import annotations

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault


def _product(x: HostArray, w: HostArray, offsets: HostArray) -> HostArray:
    y = np.zeros((len(x), w.shape[1]), x.dtype)
    for e in range(len(w)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        y[rows] = x[rows] @ w[e].T
    return y


def _wgrad(x: HostArray, grad_y: HostArray, offsets: HostArray) -> HostArray:
    out = np.zeros((len(offsets) - 1, grad_y.shape[1], x.shape[1]), x.dtype)
    for e in range(len(out)):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        out[e] = grad_y[rows].T @ x[rows]
    return out


def skips_the_last_expert(x: HostArray, w: HostArray, offsets: HostArray) -> HostArray:
    """Loop over len(offsets) - 2 groups."""
    return _product(x, w[:-1], offsets[:-1]) if len(w) > 1 else _product(x, w, offsets)


def transposes_square_weights(x: HostArray, w: HostArray, offsets: HostArray) -> HostArray:
    """Take w[e] for w[e].T where both fit."""
    square = w.shape[1] == w.shape[2]
    return _product(x, w.transpose(0, 2, 1) if square else w, offsets)


def skips_empty_groups_without_counting(
    x: HostArray, w: HostArray, offsets: HostArray
) -> HostArray:
    """Give groups that have rows consecutive weights."""
    filled = np.flatnonzero(np.diff(offsets))
    short = np.append(offsets[filled], offsets[-1])
    return _product(x, w[: len(filled)], short)


def multiplies_everything_by_masks(x: HostArray, w: HostArray, offsets: HostArray) -> HostArray:
    """Run every expert on every row and multiply the rest by 0."""
    expert = np.searchsorted(offsets[1:], np.arange(len(x)), side="right")
    with np.errstate(invalid="ignore"):
        every = np.einsum("rn,emn->rem", x, w)
        mine = (expert[:, None] == np.arange(len(w)))[:, :, None]
        return np.asarray((every * mine).sum(axis=1))


def counts_experts_in_a_byte(x: HostArray, w: HostArray, offsets: HostArray) -> HostArray:
    """Keep the expert of a row in eight bits."""
    expert = np.searchsorted(offsets[1:], np.arange(len(x)), side="right").astype(np.uint8)
    return np.einsum("rn,rmn->rm", x, w[expert]) if len(x) else _product(x, w, offsets)


def rounds_inputs_to_tf32(x: HostArray, w: HostArray, offsets: HostArray) -> HostArray:
    """Keep ten bits of the mantissa, as tensor cores do by default."""

    def cut(a: HostArray) -> HostArray:
        bits = np.ascontiguousarray(a, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.float32).astype(a.dtype)

    return _product(cut(x), cut(w), offsets)


def leaves_empty_gradients_unwritten(
    x: HostArray, grad_y: HostArray, offsets: HostArray
) -> HostArray:
    """Allocate without zeroing and write experts with rows alone."""
    out = np.full((len(offsets) - 1, grad_y.shape[1], x.shape[1]), 7.0, x.dtype)
    filled = np.diff(offsets) > 0
    out[filled] = _wgrad(x, grad_y, offsets)[filled]
    return out


def drops_the_last_partial_tile(x: HostArray, grad_y: HostArray, offsets: HostArray) -> HostArray:
    """Sum whole tiles of sixteen rows when there is at least one."""
    out = _wgrad(x, grad_y, offsets)
    for e in range(len(out)):
        n = int(offsets[e + 1] - offsets[e])
        if n > 16:
            rows = slice(int(offsets[e]), int(offsets[e]) + n // 16 * 16)
            out[e] = grad_y[rows].T @ x[rows]
    return out


def returns_the_transposed_gradient(
    x: HostArray, grad_y: HostArray, offsets: HostArray
) -> HostArray:
    """Return x.T @ grad_y where the shapes let it pass."""
    out = _wgrad(x, grad_y, offsets)
    return out.transpose(0, 2, 1).copy() if out.shape[1] == out.shape[2] else out


FAULTS = (
    Fault(
        name="gemm-skips-last-expert",
        kind="grouped_gemm",
        check="integers-are-exact",
        seen="off by one in group loops",
        subject=skips_the_last_expert,
    ),
    Fault(
        name="gemm-transposes-square-weights",
        kind="grouped_gemm",
        check="square-is-not-transposed",
        seen="transformers#33463",
        subject=transposes_square_weights,
    ),
    Fault(
        name="gemm-renumbers-after-empty-experts",
        kind="grouped_gemm",
        check="empty-experts-shift-nothing",
        seen="trap of compacted group lists",
        subject=skips_empty_groups_without_counting,
    ),
    Fault(
        name="gemm-multiplies-unused-weights-by-zero",
        kind="grouped_gemm",
        check="unused-weights-are-not-read",
        seen="transformers#48205, torchtitan#1237: 0 x Inf",
        subject=multiplies_everything_by_masks,
    ),
    Fault(
        name="gemm-expert-id-in-a-byte",
        kind="grouped_gemm",
        check="more-experts-than-a-block",
        seen="vllm#21079: limits on the number of experts",
        subject=counts_experts_in_a_byte,
    ),
    Fault(
        name="gemm-in-tf32",
        kind="grouped_gemm",
        check="within-rounding",
        seen="scattermoe#5",
        subject=rounds_inputs_to_tf32,
    ),
    Fault(
        name="wgrad-of-empty-experts-unwritten",
        kind="grouped_gemm_wgrad",
        check="empty-experts-are-zero",
        seen="pytorch#172439, MSLK#158, tokamax#887",
        subject=leaves_empty_gradients_unwritten,
    ),
    Fault(
        name="wgrad-drops-partial-tile",
        kind="grouped_gemm_wgrad",
        check="edges-of-tiles",
        seen="remainder loops of tiled kernels",
        subject=drops_the_last_partial_tile,
    ),
    Fault(
        name="wgrad-transposed-where-square",
        kind="grouped_gemm_wgrad",
        check="square-is-not-transposed",
        seen="transformers#33463",
        subject=returns_the_transposed_gradient,
    ),
)
