"""Plans on the device: the counting sort, and the view in blocks; `accel/kernels/plan.cu`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npmoe._typing import Array
from npmoe.dispatch import DispatchPlan
from npmoe.errors import DTypeError, PlanError, UnsupportedError
from npmoe.plans.blocks import BlockPlan, InvalidRoutes, check_dialect, check_rows, rows_allocated

from .kernel import Device, InOut, Kernel, Out

CHUNK = 512  # routes per block of count_routes and place_routes
# What count_routes keeps in 48 KB of shared memory.
MOST_EXPERTS = 12288
_I = np.int32


def kernel(entry: str) -> Kernel:
    """Return a kernel of the plan."""
    return Kernel("plan", entry)


def count_plan(
    device: Device,
    topk_ids: Array,
    *,
    num_ids: int,
    num_experts: int,
    num_legal: int,
    illegal: Array,
    expert_map: Array | None = None,
) -> DispatchPlan:
    """Return the plan without drops; T*K rows are allocated, -1 behind the last.

    Ids are 0..num_ids-1, of which `expert_map` makes 0..num_experts-1 or -1; others have no row,
    and ``illegal[0]`` is set for those outside -1..num_legal-1.
    """
    num_tokens, top_k = topk_ids.shape
    num_routes = num_tokens * top_k
    if num_routes >= 2**31:
        raise PlanError(
            f"plan_dispatch: topk_ids must hold fewer than 2**31 routes, got {num_routes}. "
            "Split the batch."
        )
    if num_experts > MOST_EXPERTS:
        raise UnsupportedError(
            f"plan_dispatch: num_experts must be at most {MOST_EXPERTS} on a GPU, got "
            f"{num_experts}. Its counters must fit 48 KB of shared memory."
        )
    ids = device.contiguous(topk_ids)
    chunks = -(-num_routes // CHUNK)
    counts = device.empty((max(1, chunks), num_experts), _I)
    offsets = device.empty(num_experts + 1, _I)
    pair_ids, token_ids = device.empty(num_routes, _I), device.empty(num_routes, _I)
    row_ids = device.empty((num_tokens, top_k), _I)
    sizes = _I(num_routes), _I(num_ids)
    if chunks:
        device.launch(
            kernel("count_routes"), (chunks,), 256,
            [ids, expert_map, *sizes, _I(num_legal), _I(num_experts), Out(counts), InOut(illegal)],
            shared_mem=4 * num_experts,
        )  # fmt: skip
    device.launch(
        kernel("scan_experts"), (1,), 1024,
        [InOut(counts), _I(chunks), _I(num_experts), Out(offsets)],
    )  # fmt: skip
    if chunks:
        device.launch(
            kernel("place_routes"), (chunks,), 32,
            [ids, expert_map, *sizes, _I(num_experts), _I(top_k), offsets, InOut(counts),
             Out(pair_ids), Out(token_ids), Out(row_ids)],
        )  # fmt: skip
    return DispatchPlan(
        pair_ids=pair_ids,
        token_ids=token_ids,
        row_ids=row_ids,
        expert_offsets=offsets,
        num_tokens=num_tokens,
        top_k=top_k,
    )


class Blocks(NamedTuple):
    """Blocks of one expert each, as the grouped products read them."""

    sorted_token_ids: Array
    expert_ids: Array
    num_tokens_post_padded: Array
    block_size: int
    most: int  # blocks there can be; the rest of a grid leaves at once


def most_blocks(num_routes: int, num_experts: int, block_size: int) -> int:
    """Return how many blocks so many routes can fill, whatever the routing."""
    used = min(num_routes, num_experts)
    return (num_routes + used * (block_size - 1)) // block_size


def view_blocks(
    device: Device,
    plan: DispatchPlan,
    block_size: int,
    *,
    entries: int | None = None,
    labels: Array | None = None,
) -> Blocks:
    """Return the block view of a plan, `entries` long; by default as long as it may have to be."""
    num_routes, num_experts = plan.num_tokens * plan.top_k, plan.num_experts
    most = most_blocks(num_routes, num_experts, block_size)
    entries = most * block_size if entries is None else entries
    blocks = -(-entries // block_size)
    sorted_ids, expert_ids = device.empty(entries, _I), device.empty(blocks, _I)
    starts, total = device.empty(num_experts + 1, _I), device.empty(1, _I)
    offsets = device.contiguous(plan.expert_offsets)
    device.launch(
        kernel("scan_blocks"), (1,), 1024,
        [offsets, _I(num_experts), _I(block_size), Out(starts), Out(total)],
    )  # fmt: skip
    if blocks:
        device.launch(
            kernel("fill_blocks"), (-(-blocks * block_size // 256),), 256,
            [device.contiguous(plan.pair_ids), offsets, starts, labels, _I(num_experts),
             _I(block_size), _I(num_routes), _I(entries), _I(blocks), Out(sorted_ids),
             Out(expert_ids)],
        )  # fmt: skip
    return Blocks(sorted_ids, expert_ids, total, block_size, most)


def moe_align_block_size(
    device: Device,
    topk_ids: Array,
    block_size: int,
    num_experts: int,
    expert_map: Array | None = None,
    invalid: InvalidRoutes = "keep",
) -> BlockPlan:
    """Sort routes by expert on the device, and pad every expert to whole blocks.

    Parameters
    ----------
    device : Device
    topk_ids : (T, K) int32 array of the device
    block_size, num_experts : int
    expert_map : (E,) int32 array of the device, optional
    invalid : {"keep", "drop"}
        All as in `npmoe.plans.blocks.align_block_size`, dialect "vllm".

    Returns
    -------
    BlockPlan
        New arrays of the device, as long as there.

    Raises
    ------
    DTypeError
        If ids or map are not int32.
    RangeError, PlanError, UnsupportedError
        For options that contradict each other, and sizes that the kernels do not take.

    References
    ----------
    vLLM, ``moe_align_block_size``.
    """
    function = "moe_align_block_size"
    for name, x in (("topk_ids", topk_ids), ("expert_map", expert_map)):
        if x is not None and x.dtype != _I:
            raise DTypeError(
                f"{function}: {name} must have dtype int32, got {x.dtype}. Convert it with astype."
            )
    check_dialect(function, "vllm", invalid, has_map=expert_map is not None)
    entries = rows_allocated(topk_ids.size, num_experts, block_size, "vllm")
    check_rows(function, entries)
    local_ids = None if expert_map is None else device.contiguous(expert_map)
    plan = count_plan(
        device, topk_ids, num_ids=num_experts, num_experts=num_experts, num_legal=num_experts,
        illegal=device.zeros(1, _I), expert_map=local_ids if invalid == "drop" else None,
    )  # fmt: skip
    labels = local_ids if invalid == "keep" else None
    return BlockPlan(*view_blocks(device, plan, block_size, entries=entries, labels=labels)[:3])
