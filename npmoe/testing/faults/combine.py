"""Mistakes in the weighted sum of experts' rows."""

from __future__ import annotations

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault


def _sum(
    rows: HostArray, row_ids: HostArray, weights: HostArray, kept: HostArray | None = None
) -> HostArray:
    """Add slot after slot; `kept` (T, K) says which to add, by default those with a row."""
    kept = row_ids >= 0 if kept is None else kept
    out = np.zeros((row_ids.shape[0], rows.shape[1]), rows.dtype)
    for k in range(row_ids.shape[1]):
        t = np.flatnonzero(kept[:, k])
        out[t] += weights[t, k, None] * rows[row_ids[t, k]]
    return out


def takes_minus_one_as_an_index(
    rows: HostArray, row_ids: HostArray, weights: HostArray
) -> HostArray:
    """Index with the row ids as they are; only weights of 0 would save it."""
    everything = np.full(row_ids.shape, len(rows) > 0)
    return _sum(rows, row_ids, weights, everything)


def multiplies_dropped_rows_by_zero(
    rows: HostArray, row_ids: HostArray, weights: HostArray
) -> HostArray:
    """Read some row for a dropped route, with weight 0."""
    kept = row_ids >= 0
    everything = np.full(row_ids.shape, len(rows) > 0)
    with np.errstate(invalid="ignore"):
        return _sum(rows, np.where(kept, row_ids, -1), np.where(kept, weights, 0), everything)


def multiplies_zero_rows_by_their_weights(
    rows: HostArray, row_ids: HostArray, weights: HostArray
) -> HostArray:
    """Put zeros where there is no row, and multiply by whatever the weight is."""
    padded = np.concatenate([rows, np.zeros_like(rows, shape=(1, rows.shape[1]))])
    return _sum(padded, row_ids, weights, np.ones(row_ids.shape, bool))


def renormalises_what_was_kept(
    rows: HostArray, row_ids: HostArray, weights: HostArray
) -> HostArray:
    """Divide by the sum of the kept weights, as if it had been 1 before."""
    kept = row_ids >= 0
    total = np.where(kept, weights, 0).sum(axis=1, keepdims=True)
    every = np.where(np.isfinite(weights), weights, 0).sum(axis=1, keepdims=True)
    share = np.where(total == 0, 1, every / np.where(total == 0, 1, total))
    return _sum(rows, row_ids, (weights * share).astype(rows.dtype))


def adds_in_the_order_of_rows(rows: HostArray, row_ids: HostArray, weights: HostArray) -> HostArray:
    """Scatter row after row to its token."""
    out = np.zeros((row_ids.shape[0], rows.shape[1]), rows.dtype)
    routes = np.argsort(row_ids, axis=None, kind="stable")
    routes = routes[int((row_ids < 0).sum()) :]
    part = weights.ravel()[routes, None] * rows[row_ids.ravel()[routes]]
    np.add.at(out, routes // max(1, row_ids.shape[1]), part)
    return out


def adds_in_half_precision(rows: HostArray, row_ids: HostArray, weights: HostArray) -> HostArray:
    """Keep the running sum in float16."""
    out = np.zeros((row_ids.shape[0], rows.shape[1]), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(row_ids.shape[1]):
            t = np.flatnonzero(row_ids[:, k] >= 0)
            out[t] = (out[t] + weights[t, k, None] * rows[row_ids[t, k]]).astype(np.float16)
    return out.astype(rows.dtype)


def adds_eight_slots_at_most(rows: HostArray, row_ids: HostArray, weights: HostArray) -> HostArray:
    """Unroll for the usual numbers of slots."""
    return _sum(rows, row_ids[:, :8], weights[:, :8])


def leaves_dropped_tokens_unwritten(
    rows: HostArray, row_ids: HostArray, weights: HostArray
) -> HostArray:
    """Allocate without zeroing, and write only tokens that have a row."""
    out = _sum(rows, row_ids, weights)
    out[(row_ids < 0).all(axis=1)] = 7
    return out


def cuts_row_numbers(rows: HostArray, row_ids: HostArray, weights: HostArray) -> HostArray:
    """Keep row numbers in sixteen bits, all ones for none."""
    return _sum(rows, row_ids.astype(np.uint16).astype(np.int64), weights, row_ids >= 0)


FAULTS = (
    Fault(
        name="combine-minus-one-is-the-last-row",
        kind="combine",
        check="minus-one-is-no-row",
        seen="vllm#46408: moe_sum adds garbage rows",
        subject=takes_minus_one_as_an_index,
    ),
    Fault(
        name="combine-multiplies-unused-rows-by-zero",
        kind="combine",
        check="unused-rows-are-not-read",
        seen="torchtitan#1237, transformers#48205: 0 x Inf",
        subject=multiplies_dropped_rows_by_zero,
    ),
    Fault(
        name="combine-multiplies-zero-by-dropped-weights",
        kind="combine",
        check="dropped-weights-are-not-read",
        seen="SGLang: padded tokens with id -1 keep whatever weight they have",
        subject=multiplies_zero_rows_by_their_weights,
    ),
    Fault(
        name="combine-renormalises-kept-weights",
        kind="combine",
        check="dropped-weights-are-lost",
        seen="DeepSpeed and Tutel differ: weights before or after the drop",
        subject=renormalises_what_was_kept,
    ),
    Fault(
        name="combine-adds-in-the-order-of-rows",
        kind="combine",
        check="order-follows-slots",
        seen="transformers#43360, vllm#56887: index_add and atomics",
        subject=adds_in_the_order_of_rows,
    ),
    Fault(
        name="combine-sums-in-half",
        kind="combine",
        check="sums-are-wide",
        seen="vLLM moe_sum before float32 sums",
        subject=adds_in_half_precision,
    ),
    Fault(
        name="combine-stops-after-eight-slots",
        kind="combine",
        check="many-slots",
        seen="vLLM moe_sum: one template per number of slots",
        subject=adds_eight_slots_at_most,
    ),
    Fault(
        name="combine-dropped-tokens-unwritten",
        kind="combine",
        check="all-dropped-is-zero",
        seen="transformers#48205: rows never written",
        subject=leaves_dropped_tokens_unwritten,
    ),
    Fault(
        name="combine-row-numbers-in-16-bits",
        kind="combine",
        check="rows-beyond-16-bits",
        seen="vllm#34279, sglang#4727: row offsets overflow",
        subject=cuts_row_numbers,
    ),
)
