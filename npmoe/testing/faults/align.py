"""Mistakes in sorting routes into padded blocks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault

Plan = tuple[HostArray, HostArray, HostArray]
Groups = list[tuple[int, HostArray]]  # what expert_ids says, and the routes
_LEFT_OVER: dict[int, int] = {}  # routes of the last call, by number of experts


def _groups(ids: HostArray, E: int, local_ids: HostArray | None) -> Groups:
    flat = ids.reshape(-1)
    labels = np.arange(E) if local_ids is None else local_ids
    return [(int(labels[e]), np.flatnonzero(flat == e)) for e in range(E)]


def _rows(R: int, B: int, E: int) -> int:
    return min(R * B, R + E * (B - 1)) if R < E else R + E * (B - 1)


def _lay_out(
    groups: Groups,
    R: int,
    B: int,
    E: int,
    *,
    sentinel: int | None = None,
    spare: Callable[[int], int] = lambda n: 0,  # noqa: ARG005
    tail: int = -1,
) -> Plan:
    """Write groups one behind the other; n routes get `spare(n)` blocks more than they need."""
    used = [(-(-len(routes) // B) + spare(len(routes)), g) for g, (_, routes) in enumerate(groups)]
    total = sum(n for n, _ in used) * B
    P = max(_rows(R, B, E), total)
    rows = np.full(P, R if sentinel is None else sentinel, np.int32)
    experts = np.full(-(-P // B), tail, np.int32)
    start = 0
    for n, g in used:
        label, routes = groups[g]
        rows[start * B : start * B + len(routes)] = routes
        experts[start : start + n] = label
        start += n
    return rows, experts, np.array([total], np.int32)


def _plan(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E)


def pads_with_minus_one(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Fill with -1, as expert_ids is filled."""
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E, sentinel=-1)


def pads_with_zero(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Start from zeros, so that padding computes route 0 again and again."""
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E, sentinel=0)


def pads_with_the_last_route(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Take T*K - 1 for the number behind the last route."""
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E, sentinel=ids.size - 1)


def pads_with_the_largest_number(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Fill with what is certainly no route."""
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E, sentinel=2**31 - 1)


def counts_routes_instead_of_rows(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Return the number of routes before padding."""
    rows, experts, _ = _plan(ids, B, E, local_ids)
    return rows, experts, np.array([((ids >= 0) & (ids < E)).sum()], np.int32)


def divides_and_adds_one(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Give n routes n // B + 1 blocks, except none to none."""
    return _lay_out(
        _groups(ids, E, local_ids),
        *(ids.size, B, E),
        spare=lambda n: int(n > 0 and n % B == 0),
    )


def gives_everybody_a_block(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Give experts without routes a block of padding."""
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E, spare=lambda n: int(n == 0))


def wraps_around_in_the_map(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Look ids up in the map without asking whether they are ids."""
    if local_ids is not None:
        ids = np.where(ids == -1, E - 1, ids)
    return _plan(ids, B, E, local_ids)


def counts_minus_one_for_the_last(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Use ids as indices of counters: -1 is the last one."""
    return _plan(np.where(ids == -1, E - 1, ids), B, E, local_ids)


def clips_ids(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Clip ids into range, so that routes of no expert get one."""
    return _plan(np.where(ids == -1, -1, np.clip(ids, 0, E - 1)), B, E, local_ids)


def forgets_the_last_expert(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Loop over experts with one bound too low."""
    return _lay_out(_groups(ids, E, local_ids)[:-1], ids.size, B, E)


def has_1024_counters(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Scan the counts in one block of threads, one for each expert."""
    return _lay_out(_groups(ids, E, local_ids)[:1024], ids.size, B, E)


def races_for_rows(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Take rows by an atomic counter: the order of routes is the order of threads."""
    groups = [(e, np.roll(routes, 1)) for e, routes in _groups(ids, E, local_ids)]
    return _lay_out(groups, ids.size, B, E)


def drops_the_last_partial_warp(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Give every thread T*K // 32 routes where there are enough."""
    whole = ids.size if ids.size < 32 else ids.size // 32 * 32
    groups = [(e, routes[routes < whole]) for e, routes in _groups(ids, E, local_ids)]
    return _lay_out(groups, ids.size, B, E)


def writes_a_route_twice(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Run over the end of an expert by one, if there is room."""
    groups = [
        (e, np.append(routes, routes[-1:]) if len(routes) % B else routes)
        for e, routes in _groups(ids, E, local_ids)
    ]
    return _lay_out(groups, ids.size, B, E)


def leaves_zeros_behind(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Keep expert 0 in unused blocks, as vLLM did before."""
    return _lay_out(_groups(ids, E, local_ids), ids.size, B, E, tail=0)


def never_fills_the_buffer(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Write padding inside blocks alone."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    rows[int(total[0]) :] = -(2**30)
    return rows, experts, total


def counts_blocks_before_padding(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Find a block's expert in the offsets that are not padded."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    groups = _groups(ids, E, local_ids)
    ends = np.cumsum([len(routes) for _, routes in groups])
    for b in range(int(total[0]) // B):
        e = int(np.searchsorted(ends, min(b * B, ends[-1] - 1), side="right"))
        experts[b] = groups[e][0]
    return rows, experts, total


def pads_in_front(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Put an expert's padding before its routes."""
    groups = [
        (e, np.append(np.full(-len(routes) % B, ids.size), routes))
        for e, routes in _groups(ids, E, local_ids)
    ]
    return _lay_out(groups, ids.size, B, E)


def heaviest_expert_first(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Schedule experts with many routes first."""
    groups = sorted(_groups(ids, E, local_ids), key=lambda group: -len(group[1]))
    return _lay_out(groups, ids.size, B, E)


def returns_64_bits(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Return the dtype that sorting gives."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    return rows.astype(np.int64), experts.astype(np.int64), total


def returns_used_rows_alone(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Cut the buffers to what is used; callers allocated, and captured, the whole."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    return rows[: int(total[0])], experts[: int(total[0]) // B], total


def cuts_route_numbers(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Pack the route into sixteen bits beside its expert."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    return np.where(rows == ids.size, rows, rows & 0xFFFF).astype(np.int32), experts, total


def needs_a_token(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Size a table by the largest id."""
    ids.max()
    return _plan(ids, B, E, local_ids)


def keeps_its_counters(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Zero counters when they are allocated, not when they are used again."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    before = _LEFT_OVER.get(E, 0)
    _LEFT_OVER[E] = int(total[0])
    return rows, experts, total + before


def applies_no_map(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Return global numbers, and no -1 for experts of other ranks."""
    del local_ids
    return _plan(ids, B, E)


def maps_routes_to_bits(ids: HostArray, B: int, E: int, local_ids: HostArray | None = None) -> Plan:
    """Keep one bit for each token and expert: the second of two equal choices is lost."""
    flat = ids.copy()
    for row in flat:
        _, first = np.unique(row, return_index=True)
        row[np.setdiff1d(np.arange(len(row)), first)] = E
    return _lay_out(_groups(flat, E, local_ids), ids.size, B, E)


def drops_filtered_routes(
    ids: HostArray, B: int, E: int, local_ids: HostArray | None = None
) -> Plan:
    """Leave out routes of -1 where they should lead in blocks of -1."""
    rows, experts, total = _plan(ids, B, E, local_ids)
    missing = ids.size + (E + 1) * (B - 1) - len(rows)
    rows = np.append(rows, np.full(missing, ids.size, np.int32))
    blocks = -(-len(rows) // B) - len(experts)
    return rows, np.append(experts, np.full(blocks, -1, np.int32)), total


def _fault(
    name: str, check: str, seen: str, subject: Callable[..., Plan], **options: bool | str
) -> Fault:
    return Fault(
        name=f"align-{name}",
        kind="align",
        check=check,
        seen=seen,
        subject=subject,
        options=tuple(options.items()),
    )


_CONTRACT = "vLLM moe_align_block_size: "
FAULTS = (
    _fault(
        "sentinel-minus-one",
        "sentinel-is-num-routes",
        _CONTRACT + "padding is T*K, unused blocks are -1",
        pads_with_minus_one,
    ),
    _fault(
        "sentinel-zero",
        "sentinel-is-num-routes",
        "SGLang: without pad_sorted_token_ids padding is whatever the buffer held",
        pads_with_zero,
    ),
    _fault(
        "sentinel-last-route",
        "sentinel-is-num-routes",
        _CONTRACT + "padding is T*K, off by one",
        pads_with_the_last_route,
    ),
    _fault(
        "sentinel-int-max",
        "sentinel-is-num-routes",
        "DeepEP and batched plans have sentinels of their own, E*M",
        pads_with_the_largest_number,
    ),
    _fault(
        "count-of-routes",
        "padded-count-formula",
        _CONTRACT + "num_tokens_post_pad is the sum of ceil(n_e / B) * B",
        counts_routes_instead_of_rows,
    ),
    _fault(
        "extra-block-when-full",
        "full-blocks-get-no-extra-block",
        "n // B + 1 for ceil(n / B)",
        divides_and_adds_one,
    ),
    _fault(
        "block-for-empty-experts",
        "empty-experts-get-no-block",
        _CONTRACT + "no routes, no block",
        gives_everybody_a_block,
    ),
    _fault(
        "map-of-minus-one",
        "minus-one-with-a-map",
        "vllm#46408: expert_map[-1] wraps around",
        wraps_around_in_the_map,
    ),
    _fault(
        "minus-one-is-the-last",
        "minus-one-is-no-expert",
        "sglang#12701; vLLM's older kernel indexes counters by negative ids",
        counts_minus_one_for_the_last,
    ),
    _fault(
        "ids-clipped",
        "ids-out-of-range-are-no-expert",
        "sglang#12701, sglang#30079: ids of no expert",
        clips_ids,
    ),
    _fault(
        "last-expert-forgotten",
        "first-and-last-expert",
        "off by one in loops over experts",
        forgets_the_last_expert,
    ),
    _fault(
        "1024-experts",
        "more-experts-than-a-block",
        "vllm#21079: BlockScan over at most 1,024 experts",
        has_1024_counters,
    ),
    _fault(
        "order-of-threads",
        "stable-order",
        "sglang#33511, vllm#56887: atomics order routes",
        races_for_rows,
        stable=True,
    ),
    _fault(
        "partial-warp-dropped",
        "edges-of-thread-blocks",
        "T*K // threads routes for each thread",
        drops_the_last_partial_warp,
    ),
    _fault(
        "route-twice",
        "each-route-exactly-once",
        "bounds of an expert's range, off by one",
        writes_a_route_twice,
    ),
    _fault(
        "zeros-behind",
        "strict-tail",
        "vLLM: unused expert_ids were 0 and are -1",
        leaves_zeros_behind,
        strict_tail=True,
    ),
    _fault(
        "rows-behind-unwritten",
        "strict-tail",
        "SGLang: pad_sorted_token_ids decides whether the rest is filled",
        never_fills_the_buffer,
        strict_tail=True,
    ),
    _fault(
        "experts-by-unpadded-offsets",
        "blocks-hold-one-expert",
        "two cumulative sums, padded and not",
        counts_blocks_before_padding,
    ),
    _fault(
        "padding-in-front",
        "padding-at-block-ends",
        _CONTRACT + "an expert's routes, then padding",
        pads_in_front,
    ),
    _fault(
        "heaviest-first",
        "experts-ascend",
        "schedulers that sort experts by load",
        heaviest_expert_first,
    ),
    _fault(
        "64-bits",
        "dtypes-and-lengths",
        "torch.argsort returns int64; kernels read int32",
        returns_64_bits,
    ),
    _fault(
        "used-rows-alone",
        "dtypes-and-lengths",
        _CONTRACT + "buffers have the length of the worst case",
        returns_used_rows_alone,
    ),
    _fault(
        "route-numbers-in-16-bits",
        "routes-beyond-16-bits",
        "SonicMoE packs a route and its expert into one key",
        cuts_route_numbers,
    ),
    _fault("needs-a-token", "no-tokens", "grouped_mm and eager experts at T = 0", needs_a_token),
    _fault(
        "counters-kept",
        "calls-do-not-remember",
        "SGLang: the caller zeroes cumsum_buffer",
        keeps_its_counters,
    ),
    _fault(
        "no-map", "expert-map", _CONTRACT + "expert_ids = expert_map[expert_ids]", applies_no_map
    ),
    _fault(
        "routing-bits",
        "duplicates-are-two-routes",
        "Megatron routing_map: one bit for each token and expert",
        maps_routes_to_bits,
    ),
    _fault(
        "filtered-routes-dropped",
        "minus-one-is-no-expert",
        "SGLang: bucket 0 is that of -1, before expert 0",
        drops_filtered_routes,
        dialect="sglang",
    ),
)
