"""The block view of a routing: routes in padded blocks of one expert each, as kernels read them."""

from __future__ import annotations

import operator
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from npmoe._checks import Axes, check_integer_ids, require
from npmoe._typing import HostArray
from npmoe.errors import DTypeError, PlanError

BlockDialect: TypeAlias = Literal["vllm", "vllm_old_tail", "sglang", "naive"]
InvalidRoutes: TypeAlias = Literal["keep", "drop"]
BLOCK_DIALECTS = ("vllm", "vllm_old_tail", "sglang", "naive")


class BlockPlan(NamedTuple):
    """Routes in blocks of one expert each; a tuple, since kernels return and take it as one.

    Attributes
    ----------
    sorted_token_ids : (P,) int32 array or None
        The route of every row, and T*K in padding rows and behind the last block; None if block b
        is route b alone.
    expert_ids : (P / B rounded up,) int32 array
        The expert of every block; -1 where the block computes nothing but zeros.
    num_tokens_post_padded : (1,) int32 array
        Rows in blocks; what lies behind them has no meaning.
    """

    sorted_token_ids: HostArray | None
    expert_ids: HostArray
    num_tokens_post_padded: HostArray


def align_block_size(
    topk_ids: HostArray,
    block_size: int,
    num_experts: int,
    expert_map: HostArray | None = None,
    dialect: BlockDialect = "vllm",
    invalid: InvalidRoutes = "keep",
    *,
    pad_sorted_ids: bool = False,
) -> BlockPlan:
    """Sort routes by expert and pad every expert to whole blocks.

    Expert e with n_e routes has ceil(n_e / B) blocks; experts ascend, and routes inside an expert.
    Rows beyond n_e hold the sentinel T*K. P = T*K + E*(B-1) rows are allocated, or T*K*B if that
    is less and T*K < E.

    Parameters
    ----------
    topk_ids : (T, K) int array
        Chosen experts. Ids outside 0..E-1 have no row.
    block_size : int
        B.
    num_experts : int
        E, of all ranks together if there is an `expert_map`.
    expert_map : (E,) int array, optional
        The number of every expert on this rank, -1 for experts of other ranks; it is
        `expert_ids` that holds the numbers.
    dialect : {"vllm", "vllm_old_tail", "sglang", "naive"}
        "vllm": `expert_ids` is -1 behind the last block. "vllm_old_tail": it is 0 there (the
        number of expert 0, with a map). "sglang": routes with id -1 have a bucket of their own
        before expert 0, in blocks of expert -1, and P = T*K + (E+1)*(B-1). "naive": one route per
        block, in order, of expert -1 where the id is none; no map.
    invalid : {"keep", "drop"}
        Whether routes to other ranks keep their blocks, with expert -1, or have no row. "sglang"
        keeps them, together with -1.
    pad_sorted_ids : bool
        Round P up to a multiple of B.

    Returns
    -------
    BlockPlan
        New arrays.

    Raises
    ------
    DTypeError, ShapeError
        If an argument is not of integers, or not of this shape.
    RangeError
        If a size is less than 1, or options contradict each other.
    PlanError
        If the map is not one, or P does not fit int32.

    Notes
    -----
    **Cost**: O(T*K + E*B), on the host. **Order**: stable, hence reproducible.

    References
    ----------
    vLLM and SGLang, ``moe_align_block_size``; "drop" is vLLM's ``ignore_invalid_experts``.

    Examples
    --------
    >>> import numpy as np
    >>> blocks = align_block_size(np.array([[2, 0], [2, 1], [0, 2]]), block_size=4, num_experts=4)
    >>> blocks.sorted_token_ids[:12].reshape(3, 4).tolist()
    [[1, 4, 6, 6], [3, 6, 6, 6], [0, 2, 5, 6]]
    >>> blocks.expert_ids.tolist(), blocks.num_tokens_post_padded.tolist()
    ([0, 1, 2, -1, -1], [12])
    """
    topk_ids = np.asarray(topk_ids)
    function = "align_block_size"
    check_integer_ids(function, "topk_ids", topk_ids)
    Axes(function).check("topk_ids", topk_ids, "T", "K")
    B = check_size(function, "block_size", block_size)
    E = check_size(function, "num_experts", num_experts)
    local_ids = None if expert_map is None else check_expert_map(function, expert_map, E)
    check_dialect(function, dialect, invalid, has_map=local_ids is not None)
    flat = topk_ids.reshape(-1)
    known, filtered = (flat >= 0) & (flat < E), flat == -1
    ids = np.where(known, flat.astype(np.int64), E)  # E is no expert
    if dialect == "naive":
        check_rows(function, flat.shape[0] * B)
        return one_route_blocks(np.where(known, ids, -1), B)
    labels = np.arange(E)
    if local_ids is not None:
        if dialect == "sglang" or invalid == "drop":
            mapped = np.append(local_ids, -1)[ids]
            filtered |= known & (mapped < 0)
            ids = np.where(mapped < 0, E, mapped)
        else:
            labels = local_ids
    if dialect == "sglang":
        ids = np.where(filtered, 0, ids + 1)
        labels = np.arange(-1, E)
    rows = rows_allocated(flat.shape[0], E, B, dialect, pad_sorted_ids=pad_sorted_ids)
    check_rows(function, rows)
    tail = int(labels[0]) if dialect == "vllm_old_tail" else -1
    return fill_blocks(ids, labels, B, rows, tail)


def align_block_size_batched(
    tokens_per_expert: HostArray, max_tokens: int, block_size: int
) -> BlockPlan:
    """Cut experts' buffers of M rows into blocks, leaving out those without a valid row.

    Row i of expert e is number e*M + i and valid if i < n_e; the sentinel is E*M.

    Parameters
    ----------
    tokens_per_expert : (E,) int array
        n_e, the valid rows at the start of every buffer; 0..M.
    max_tokens : int
        M.
    block_size : int
        B.

    Returns
    -------
    BlockPlan
        New arrays; E * (M rounded up to a multiple of B) rows, `expert_ids` -1 behind the last
        block.

    Raises
    ------
    DTypeError, ShapeError
        If an argument is not of integers, or not of this shape.
    RangeError
        If a size is less than 1.
    PlanError
        If a count is not in 0..M, or the rows do not fit int32.

    Notes
    -----
    **Cost**: O(E*M), on the host.

    References
    ----------
    vLLM, ``batched_moe_align_block_size``, for the low-latency kernels of DeepEP.

    Examples
    --------
    >>> import numpy as np
    >>> blocks = align_block_size_batched(np.array([2, 0, 3]), max_tokens=4, block_size=2)
    >>> blocks.sorted_token_ids.tolist()
    [0, 1, 8, 9, 10, 12, 12, 12, 12, 12, 12, 12]
    >>> blocks.expert_ids.tolist(), blocks.num_tokens_post_padded.tolist()
    ([0, 2, 2, -1, -1, -1], [6])
    """
    counts = np.asarray(tokens_per_expert)
    function = "align_block_size_batched"
    check_integer_ids(function, "tokens_per_expert", counts)
    Axes(function).check("tokens_per_expert", counts, "E")
    M = check_size(function, "max_tokens", max_tokens)
    B = check_size(function, "block_size", block_size)
    E = counts.shape[0]
    outside = np.flatnonzero((counts < 0) | (counts > M))
    if outside.size:
        e = int(outside[0])
        raise PlanError(
            f"{function}: tokens_per_expert must lie in 0..{M}, got {int(counts[e])} for expert "
            f"{e}. The bound is max_tokens."
        )
    rows = E * -(-M // B) * B
    check_rows(function, rows)
    valid = np.arange(M) < counts[:, None]  # (E, M)
    experts = np.where(valid, np.arange(E)[:, None], E).reshape(-1)
    return fill_blocks(experts, np.arange(E), B, rows, tail=-1)


def fill_blocks(
    buckets: HostArray, labels: HostArray, block_size: int, rows: int, tail: int
) -> BlockPlan:
    """Sort routes by bucket (R,), len(labels) being none, into padded blocks with labels."""
    num_buckets = labels.shape[0]
    counts = np.bincount(buckets, minlength=num_buckets + 1)[:num_buckets]
    # Sixteen bits let NumPy's stable sort be a radix sort.
    key = buckets.astype(np.uint16 if num_buckets < 2**16 else np.int32)
    order = np.argsort(key, kind="stable")[: int(counts.sum())]
    blocks = -(-counts // block_size)
    padding_before = np.cumsum(blocks * block_size - counts) - (blocks * block_size - counts)
    sorted_token_ids = np.full(rows, buckets.shape[0], np.int32)
    sorted_token_ids[np.arange(order.shape[0]) + np.repeat(padding_before, counts)] = order
    used = np.repeat(labels, blocks)
    expert_ids = np.full(-(-rows // block_size), tail, np.int32)
    expert_ids[: used.shape[0]] = used
    post_padded = np.array([used.shape[0] * block_size], np.int32)
    return BlockPlan(sorted_token_ids, expert_ids, post_padded)


def one_route_blocks(experts: HostArray, block_size: int) -> BlockPlan:
    """Return the "naive" dialect of the expert of every route (R,), -1 for none."""
    post_padded = np.array([experts.shape[0] * block_size], np.int32)
    return BlockPlan(None, experts.astype(np.int32), post_padded)


def rows_allocated(
    num_routes: int,
    num_experts: int,
    block_size: int,
    dialect: BlockDialect,
    *,
    pad_sorted_ids: bool = False,
) -> int:
    """Return P, the length of sorted_token_ids."""
    buckets = num_experts + 1 if dialect == "sglang" else num_experts
    rows = num_routes + buckets * (block_size - 1)
    if pad_sorted_ids:
        rows = -(-rows // block_size) * block_size
    if dialect != "sglang" and num_routes < num_experts:
        rows = min(rows, num_routes * block_size)
    return rows


def check_size(function: str, name: str, value: int) -> int:
    """Return `value` as an int of at least 1, or raise."""
    try:
        size = operator.index(value)
    except TypeError:
        raise DTypeError(f"{function}: {name} must be an integer, got {value!r}.") from None
    require(size >= 1, f"{function}: {name} must be at least 1, got {size}.")
    return size


def check_expert_map(function: str, expert_map: HostArray, num_experts: int) -> HostArray:
    """Return the map as (E,) int64, or raise."""
    local_ids = np.asarray(expert_map)
    check_integer_ids(function, "expert_map", local_ids)
    axes = Axes(function)
    axes.bind("num_experts", E=num_experts)
    axes.check("expert_map", local_ids, "E")
    outside = np.flatnonzero((local_ids < -1) | (local_ids >= num_experts))
    if outside.size:
        e = int(outside[0])
        raise PlanError(
            f"{function}: expert_map must lie in -1..{num_experts - 1}, got {int(local_ids[e])} "
            f"for expert {e}. -1 means an expert of another rank."
        )
    local_ids = local_ids.astype(np.int64)
    shared = np.flatnonzero(np.bincount(local_ids[local_ids >= 0]) > 1)
    if shared.size:
        first, second = np.flatnonzero(local_ids == shared[0])[:2].tolist()
        raise PlanError(
            f"{function}: expert_map must give every expert its own number, got {int(shared[0])} "
            f"for experts {first} and {second}."
        )
    return local_ids


def check_dialect(
    function: str, dialect: BlockDialect, invalid: InvalidRoutes, *, has_map: bool
) -> None:
    """Raise RangeError unless the options are known and go together."""
    require(
        dialect in BLOCK_DIALECTS,
        f"{function}: dialect must be one of {', '.join(BLOCK_DIALECTS)}, got {dialect!r}.",
    )
    require(
        invalid in ("keep", "drop"),
        f"{function}: invalid must be 'keep' or 'drop', got {invalid!r}.",
    )
    require(
        invalid == "keep" or (has_map and dialect != "sglang"),
        f"{function}: invalid must be 'keep' without an expert_map and in dialect 'sglang', got "
        f"{invalid!r}. It says what becomes of routes to experts of other ranks.",
    )
    require(
        not (has_map and dialect == "naive"),
        f"{function}: expert_map must be None in dialect 'naive', got one. Every route has a "
        "block there.",
    )


def check_rows(function: str, rows: int) -> None:
    """Raise PlanError unless row numbers fit int32."""
    if rows >= 2**31:
        raise PlanError(
            f"{function}: block_size must leave fewer than 2**31 rows, got {rows}. Split the batch."
        )
