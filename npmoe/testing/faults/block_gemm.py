"""Mistakes in the product over padded blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault

Blocks = Iterator[tuple[HostArray, int]]


def _blocks(rows: HostArray, experts: HostArray, total: int) -> Blocks:
    """Yield the rows and the expert of every block within `total` rows."""
    size = len(rows) // max(1, len(experts))
    for b in range(total // size if size else 0):
        yield rows[b * size : (b + 1) * size], int(experts[b])


def _product(
    a: HostArray,
    w: HostArray,
    blocks: Blocks,
    top_k: int,
    weights: HostArray | None,
    *,
    token: Callable[[HostArray], HostArray] | None = None,
) -> HostArray:
    R = len(a) * top_k
    out = np.zeros((R, w.shape[1]), a.dtype)
    for block, e in blocks:
        routes = block[block < R]
        if e < 0:
            out[routes] = 0
            continue
        x = a[routes // top_k if token is None else token(routes)]
        out[routes] = x @ w[e].T
        if weights is not None:
            out[routes] *= weights.reshape(-1)[routes, None]
    return out


def reads_the_route_as_a_token(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Take row `route` of a, as the second product does, and stay inside a."""
    blocks = _blocks(rows, experts, int(total[0]))
    return _product(a, w, blocks, top_k, weights, token=lambda r: r % max(1, len(a)))


def divides_in_the_second_product(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Divide by the layer's top_k, here 2, also where a has a row for every route."""
    blocks = _blocks(rows, experts, int(total[0]))
    return _product(a, w, blocks, top_k, weights, token=lambda r: r // max(2, top_k))


def weights_by_token(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Read the weight at the token's number instead of the route's."""
    if weights is not None:
        weights = weights.reshape(-1)[np.arange(weights.size) // top_k]
    return _product(a, w, _blocks(rows, experts, int(total[0])), top_k, weights)


def weights_of_the_first_product_only(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Apply weights on the input's side, hence never where top_k is 1."""
    weights = None if top_k == 1 else weights
    return _product(a, w, _blocks(rows, experts, int(total[0])), top_k, weights)


def clips_the_sentinel(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Clip row numbers to stay in bounds: padding becomes the last route."""
    R = len(a) * top_k
    if R:
        rows = np.minimum(rows, R - 1)
    return _product(a, w, _blocks(rows, experts, int(total[0])), top_k, weights)


def takes_minus_one_as_an_index(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Read w[-1] for blocks without expert."""
    return _product(a, w, _blocks(rows, experts % len(w), int(total[0])), top_k, weights)


def leaves_foreign_blocks_unwritten(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Return early for blocks without expert, in memory that was never zeroed."""
    out = _product(a, w, _blocks(rows, experts, int(total[0])), top_k, weights)
    for block, e in _blocks(rows, experts, int(total[0])):
        if e < 0:
            out[block[block < len(out)]] = 7
    return out


def runs_over_the_whole_buffer(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,  # noqa: ARG001  # the mistake
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Never look at num_tokens_post_padded."""
    return _product(a, w, _blocks(rows, experts, len(rows)), top_k, weights)


def loads_the_next_block_early(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Fetch tokens of the block after the last one, and not use them."""
    size = len(rows) // max(1, len(experts))
    behind = rows[int(total[0]) : int(total[0]) + size]
    a[np.where(behind == len(a) * top_k, 0, behind // top_k)]
    return _product(a, w, _blocks(rows, experts, int(total[0])), top_k, weights)


def transposes_square_weights(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Take w[e] for w[e].T where both fit."""
    w = w.transpose(0, 2, 1) if w.shape[1] == w.shape[2] else w
    return _product(a, w, _blocks(rows, experts, int(total[0])), top_k, weights)


def counts_blocks_of_sixteen(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Cut large blocks into tiles of sixteen rows, and forget the rest."""
    cut = (
        (b if len(b) < 16 else b[: len(b) // 16 * 16], e)
        for b, e in _blocks(rows, experts, int(total[0]))
    )
    return _product(a, w, cut, top_k, weights)


def cuts_route_numbers(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Compute the token in sixteen bits."""
    blocks = _blocks(rows, experts, int(total[0]))
    return _product(a, w, blocks, top_k, weights, token=lambda r: r.astype(np.uint16) // top_k)


def multiplies_all_weights_by_masks(
    a: HostArray,
    w: HostArray,
    rows: HostArray,
    experts: HostArray,
    total: HostArray,
    top_k: int,
    weights: HostArray | None = None,
) -> HostArray:
    """Select the expert's weights by a product with a one-hot vector."""

    def select(e: int) -> HostArray:
        with np.errstate(invalid="ignore"):
            return np.tensordot((np.arange(len(w)) == e).astype(w.dtype), w, 1)

    chosen = np.stack([select(e) for _, e in _blocks(rows, experts, int(total[0]))] or [w[0]])
    numbered = (
        (block, i if e >= 0 else -1)
        for i, (block, e) in enumerate(_blocks(rows, experts, int(total[0])))
    )
    return _product(a, chosen, numbered, top_k, weights)


def _fault(name: str, check: str, seen: str, subject: Callable[..., HostArray]) -> Fault:
    return Fault(name=f"blocks-{name}", kind="block_gemm", check=check, seen=seen, subject=subject)


FAULTS = (
    _fault(
        "route-for-token",
        "token-is-route-over-top-k",
        "vLLM fused_moe_kernel: sorted_id // top_k in the first product alone",
        reads_the_route_as_a_token,
    ),
    _fault(
        "divide-in-second-product",
        "second-product-reads-routes",
        "vLLM fused_moe_kernel: top_k = 1 in the second product",
        divides_in_the_second_product,
    ),
    _fault(
        "weights-by-token",
        "weights-are-of-routes",
        "vLLM fused_moe_kernel: topk_weights.ravel()[sorted_id]",
        weights_by_token,
    ),
    _fault(
        "weights-before-not-behind",
        "second-product-weights",
        "vllm#16744, llm-compressor#1907: weight before or after the experts",
        weights_of_the_first_product_only,
    ),
    _fault(
        "sentinel-clipped",
        "padding-writes-nothing",
        "padding rows masked by clipping; vLLM masks sorted_id < R",
        clips_the_sentinel,
    ),
    _fault(
        "expert-minus-one-wraps",
        "blocks-without-expert-are-zero",
        "vllm#46408: an index of -1 wraps around",
        takes_minus_one_as_an_index,
    ),
    _fault(
        "foreign-blocks-unwritten",
        "blocks-without-expert-are-zero",
        "vLLM write_zeros_to_output; transformers#48205: rows never written",
        leaves_foreign_blocks_unwritten,
    ),
    _fault(
        "whole-buffer",
        "rows-behind-the-last-block",
        "vLLM's tail of expert_ids was 0 and is -1: kernels stop at num_tokens_post_padded",
        runs_over_the_whole_buffer,
    ),
    _fault(
        "prefetches-behind-the-end",
        "garbage-behind-the-last-block",
        "SGLang: without pad_sorted_token_ids the tail is whatever was there",
        loads_the_next_block_early,
    ),
    _fault(
        "transposed-where-square",
        "square-is-not-transposed",
        "transformers#33463",
        transposes_square_weights,
    ),
    _fault(
        "partial-tiles-dropped",
        "every-block-size",
        "remainder loops of tiled kernels",
        counts_blocks_of_sixteen,
    ),
    _fault(
        "route-numbers-in-16-bits",
        "routes-beyond-16-bits",
        "vllm#34279, sglang#4727: row offsets overflow",
        cuts_route_numbers,
    ),
    _fault(
        "unused-weights-times-zero",
        "unused-weights-are-not-read",
        "torchtitan#1237, transformers#48205: 0 x Inf",
        multiplies_all_weights_by_masks,
    ),
)
