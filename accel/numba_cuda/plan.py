"""From chosen experts to rows in expert order, and to blocks of one expert each.

A counting sort in three passes, stable, without atomics on anything whose order could show; then
the view in blocks. The reference is `npmoe.plan_dispatch` and `npmoe.align_block_size`; the twin is
`accel/kernels/plan.cu`::

    topk_ids          2 0 | 2 1 | 0 2                       route p = t * top_k + k
                          |  count_routes: a block per CHUNK routes, counters in shared memory
    counts (chunks, E)    [2 1 3 0] ...
                          |  scan_experts: one block; thread e walks down column e, so that
                          |  counts[c, e] = routes of e in chunks before c; then a scan over e
    expert_offsets    0 2 3 6 6
                          |  place_routes: a warp per chunk, 32 routes at a time; a route's place is
                          |  offset of its expert + earlier chunks + earlier lanes that chose it
    pair_ids          1 4 3 0 2 5                           row r holds route pair_ids[r]
                          |  scan_blocks, fill_blocks: an expert's rows, padded to whole blocks
    sorted_token_ids  1 4 6 6 | 3 6 6 6 | 0 2 5 6           blocks of 4; 6 = num_routes: padding
    expert_ids        0         1         2

A thread block of a product finds its expert in expert_ids[block], and its rows through
sorted_token_ids[block * block_size ...] and row_ids.
"""

from numba import cuda
from numba.cuda.types import int32

from ..device.plans import CHUNK
from .words import ALL_LANES, WARP, bounds, expert_of_entry, inline, natural, quotient

INTS, TABLE = int32[::1], int32[:, ::1]


@inline
def expert_of(topk_ids, expert_map, p, num_ids):
    """Return the expert of a route: its id, or the map's number for it; -1 if it has no row."""
    e = topk_ids[p]
    if e < 0 or e >= num_ids:
        e = -1
    elif expert_map.size:
        e = expert_map[natural(e)]
    return e


@bounds(256)
def count_routes(
    topk_ids: INTS, expert_map: INTS, num_routes: int32, num_ids: int32, num_legal: int32,
    num_experts: int32, counts: TABLE, illegal: INTS,
):  # fmt: skip
    """Grid chunks, 256 threads, 4 * num_experts bytes of shared memory.

    Ids must lie in -1..num_legal-1; identity experts have ids beyond num_ids, and no row.
    """
    found = cuda.shared.array(0, int32)  # (num_experts,)
    t, chunk = natural(cuda.threadIdx.x), natural(cuda.blockIdx.x)
    e = t
    while e < num_experts:
        found[e] = 0
        e = natural(e + 256)
    cuda.syncthreads()
    i = t
    while i < CHUNK and chunk * CHUNK + i < num_routes:
        p = chunk * CHUNK + i
        e = expert_of(topk_ids, expert_map, p, num_ids)
        if e >= 0:
            cuda.atomic.add(found, natural(e), 1)
        if topk_ids[p] < -1 or topk_ids[p] >= num_legal:
            cuda.atomic.exch(illegal, 0, 1)
        i = natural(i + 256)
    cuda.syncthreads()
    e = t
    while e < num_experts:
        counts[chunk, e] = found[e]
        e = natural(e + 256)


@inline
def scan_block(value, warps):
    """Return what lower threads of 1024 bring together, and what all bring."""
    t = natural(cuda.threadIdx.x)
    lane, warp = t % WARP, t // WARP
    upto = value
    step = 1
    while step < WARP:
        below = cuda.shfl_up_sync(ALL_LANES, upto, step)
        if lane >= step:
            upto += below
        step *= 2
    if lane == WARP - 1:
        warps[warp] = upto
    cuda.syncthreads()
    before = total = int32(0)
    for w in range(32):
        if w < warp:
            before += warps[w]
        total += warps[w]
    cuda.syncthreads()
    return before + upto - value, total


@bounds(1024)
def scan_experts(counts: TABLE, chunks: int32, num_experts: int32, expert_offsets: INTS):
    """Grid 1, 1024 threads: 1024 experts at a time."""
    warps = cuda.shared.array(32, int32)
    t = natural(cuda.threadIdx.x)
    first, begin = 0, 0
    while first < num_experts:
        e = natural(first + t)
        routes = int32(0)
        if e < num_experts:
            c = 0
            while c < chunks:
                here = counts[c, e]
                counts[c, e] = routes
                routes = int32(routes + here)
                c = natural(c + 1)
        before, total = scan_block(routes, warps)
        if e < num_experts:
            expert_offsets[e] = begin + before
        begin += total
        first += 1024
    if t == 0:
        expert_offsets[natural(num_experts)] = begin


@bounds(32)
def place_routes(
    topk_ids: INTS, expert_map: INTS, num_routes: int32, num_ids: int32, num_experts: int32,
    top_k: int32, expert_offsets: INTS, counts: TABLE, pair_ids: INTS, token_ids: INTS,
    row_ids: INTS,
):  # fmt: skip
    """Grid chunks, one warp; fills pair_ids and token_ids (-1 behind the last row) and row_ids."""
    lane, chunk = natural(cuda.threadIdx.x) % WARP, natural(cuda.blockIdx.x)
    num_rows = expert_offsets[natural(num_experts)]
    placed = counts[chunk]  # routes of each expert that have their rows
    i = lane
    while i < CHUNK:
        p = chunk * CHUNK + i
        is_route = p < num_routes
        e = -1
        if is_route:
            e = expert_of(topk_ids, expert_map, p, num_ids)
        same = cuda.match_any_sync(ALL_LANES, int32(e))
        rank = cuda.popc(same & ((1 << lane) - 1))
        if e >= 0:
            row = natural(expert_offsets[natural(e)] + placed[natural(e)] + rank)
            pair_ids[row] = p
            token_ids[row] = quotient(p, top_k)
            row_ids[p] = row
        elif is_route:
            row_ids[p] = -1
        if is_route and p >= num_rows:
            pair_ids[p] = -1
            token_ids[p] = -1
        cuda.syncwarp()  # everybody has read `placed`
        if e >= 0 and rank == 0:
            placed[natural(e)] += cuda.popc(same)
        cuda.syncwarp()
        i = natural(i + WARP)


@bounds(1024)
def scan_blocks(
    expert_offsets: INTS, num_experts: int32, block_size: int32, block_offsets: INTS,
    num_tokens_post_padded: INTS,
):  # fmt: skip
    """Grid 1, 1024 threads: the first block of every expert."""
    warps = cuda.shared.array(32, int32)
    t = natural(cuda.threadIdx.x)
    first, begin = 0, 0
    while first < num_experts:
        e = natural(first + t)
        blocks = int32(0)
        if e < num_experts:
            rows = expert_offsets[e + 1] - expert_offsets[e]
            blocks = int32(quotient(rows + block_size - 1, block_size))
        before, total = scan_block(blocks, warps)
        if e < num_experts:
            block_offsets[e] = begin + before
        begin += total
        first += 1024
    if t == 0:
        block_offsets[natural(num_experts)] = begin
        num_tokens_post_padded[0] = begin * block_size


@bounds(256)
def fill_blocks(
    pair_ids: INTS, expert_offsets: INTS, block_offsets: INTS, labels: INTS, num_experts: int32,
    block_size: int32, num_routes: int32, entries: int32, blocks: int32, sorted_token_ids: INTS,
    expert_ids: INTS,
):  # fmt: skip
    """Grid entries / 256, 256 threads: an entry each.

    `labels` names the experts otherwise (-1: of another rank); behind the last block it is -1.
    """
    i = natural(cuda.blockIdx.x * 256 + cuda.threadIdx.x)
    b = quotient(i, block_size)
    at = i - b * block_size
    if b >= blocks:
        return
    e, entry = -1, num_routes
    if b < block_offsets[natural(num_experts)]:
        e = expert_of_entry(block_offsets, num_experts, b)
        row = expert_offsets[e] + (b - block_offsets[e]) * block_size + at
        if row < expert_offsets[natural(e + 1)]:
            entry = pair_ids[natural(row)]
        if labels.size:
            e = labels[e]
    if i < entries:
        sorted_token_ids[i] = entry
    if at == 0:
        expert_ids[b] = e
