"""Dispatch plans as tables, and back: blocks, Megatron's routing map, capacity slots."""

from __future__ import annotations

import numpy as np

from npmoe._checks import Axes, check_integer_ids
from npmoe._typing import HostArray
from npmoe.dispatch import DispatchPlan
from npmoe.errors import PlanError, ShapeError
from npmoe.plans.blocks import (
    BlockDialect,
    BlockPlan,
    check_dialect,
    check_rows,
    check_size,
    fill_blocks,
    one_route_blocks,
    rows_allocated,
)
from npmoe.plans.layouts import plan_from_rows


def to_blocks(plan: DispatchPlan, *, block_size: int, dialect: BlockDialect = "vllm") -> BlockPlan:
    """Return a plan's rows in padded blocks, as `align_block_size` does for ids.

    Parameters
    ----------
    plan : DispatchPlan
        On the host. Its dropped routes are treated as id -1.
    block_size : int
        B.
    dialect : {"vllm", "vllm_old_tail", "sglang", "naive"}
        As in `align_block_size`.

    Returns
    -------
    BlockPlan
        Lost: E, K, and a capacity with its slots.

    Raises
    ------
    PlanError
        If the rows do not fit int32.
    RangeError
        If there is no such dialect, or B is less than 1.
    """
    function = "to_blocks"
    B = check_size(function, "block_size", block_size)
    check_dialect(function, dialect, "keep", has_map=False)
    E, num_routes = plan.num_experts, plan.num_tokens * plan.top_k
    experts = np.full(num_routes, -1)
    experts[plan.pair_ids[: plan.num_rows]] = np.repeat(np.arange(E), plan.tokens_per_expert)
    rows = rows_allocated(num_routes, E, B, dialect)
    check_rows(function, max(rows, num_routes * B) if dialect == "naive" else rows)
    if dialect == "naive":
        return one_route_blocks(experts, B)
    if dialect == "sglang":
        return fill_blocks(experts + 1, np.arange(-1, E), B, rows, tail=-1)
    tail = 0 if dialect == "vllm_old_tail" else -1
    return fill_blocks(np.where(experts < 0, E, experts), np.arange(E), B, rows, tail)


def from_blocks(
    blocks: BlockPlan, *, block_size: int, num_experts: int, num_tokens: int, top_k: int
) -> DispatchPlan:
    """Return the plan of blocks of any dialect; routes in blocks of expert -1 have no row.

    Parameters
    ----------
    blocks : BlockPlan
        A right one, which `validate_plan` tells.
    block_size : int
        B.
    num_experts : int
        E, or the number of experts on this rank if the blocks were made with a map.
    num_tokens, top_k : int
        T and K.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    PlanError
        If an expert or a route is out of range, or a route is in two blocks.
    """
    function = "from_blocks"
    B = check_size(function, "block_size", block_size)
    num_routes = num_tokens * top_k
    used = int(blocks.num_tokens_post_padded[0])
    if blocks.sorted_token_ids is None:
        routes, owners = np.arange(num_routes), blocks.expert_ids.astype(np.int64)
        if owners.shape[0] != num_routes:
            raise PlanError(
                f"{function}: expert_ids must have {num_routes} entries, one for each route, got "
                f"{owners.shape[0]}."
            )
    else:
        rows = blocks.sorted_token_ids[:used].astype(np.int64)
        owners = np.repeat(blocks.expert_ids[: used // B], B).astype(np.int64)
        if rows.shape != (used,) or owners.shape != (used,):
            raise PlanError(
                f"{function}: num_tokens_post_padded must be whole blocks of {B} in both arrays, "
                f"got {used}."
            )
        routes, owners = rows[rows != num_routes], owners[rows != num_routes]
    if owners.size and not (owners.min() >= -1 and owners.max() < num_experts):
        raise PlanError(
            f"{function}: expert_ids must lie in -1..{num_experts - 1}, got {owners.min()}.."
            f"{owners.max()}."
        )
    routes, owners = routes[owners >= 0], owners[owners >= 0]
    routes = routes[np.argsort(owners, kind="stable")]
    offsets = np.append(0, np.cumsum(np.bincount(owners, minlength=num_experts)))
    return plan_from_rows(function, "expert_ids", offsets, routes, num_tokens, top_k)


def to_routing_map(plan: DispatchPlan) -> HostArray:
    """Return which token has a row of which expert: Megatron's ``routing_map``.

    Parameters
    ----------
    plan : DispatchPlan
        On the host.

    Returns
    -------
    (T, E) bool array
        Lost: the slots, and with them the order of a token's experts.

    Raises
    ------
    PlanError
        If a token has an expert twice.
    """
    routing_map = np.zeros((plan.num_tokens, plan.num_experts), bool)
    tokens, experts = _pairs(plan)
    routing_map[tokens, experts] = True
    if int(routing_map.sum()) != plan.num_rows:
        raise PlanError(
            f"to_routing_map: plan must give a token each expert once, got {plan.num_rows} rows "
            f"for {int(routing_map.sum())} pairs."
        )
    return routing_map


def to_routing_probs(plan: DispatchPlan, topk_weights: HostArray) -> HostArray:
    """Return the weights of kept routes by expert, 0 elsewhere: Megatron's ``probs``.

    Parameters
    ----------
    plan : DispatchPlan
        On the host.
    topk_weights : (T, K) float array

    Returns
    -------
    (T, E) float array
        Of the dtype of the weights. Lost: which weights of 0 are of routes; keep the map.

    Raises
    ------
    ShapeError
        If the weights are not of the plan.
    """
    axes = Axes("to_routing_probs")
    axes.bind("the plan", T=plan.num_tokens, K=plan.top_k)
    axes.check("topk_weights", topk_weights, "T", "K")
    probs = np.zeros((plan.num_tokens, plan.num_experts), topk_weights.dtype)
    tokens, experts = _pairs(plan)
    probs[tokens, experts] = topk_weights.reshape(-1)[plan.pair_ids[: plan.num_rows]]
    return probs


def from_routing_map(routing_map: HostArray, *, top_k: int | None = None) -> DispatchPlan:
    """Return the plan of Megatron's map; a token's experts take its first slots in rising order.

    Parameters
    ----------
    routing_map : (T, E) bool array
    top_k : int, optional
        K; None is the largest number of experts of a token.

    Returns
    -------
    DispatchPlan
        Dropless.

    Raises
    ------
    ShapeError
        If the map has not two axes.
    PlanError
        If a token has more than K experts.
    """
    function = "from_routing_map"
    routing_map = np.asarray(routing_map).astype(bool)
    Axes(function).check("routing_map", routing_map, "T", "E")
    most = int(routing_map.sum(axis=1).max(initial=0))
    K = most if top_k is None else check_size(function, "top_k", top_k)
    if most > K:
        raise PlanError(
            f"{function}: top_k must be at least {most}, got {K}. A token has so many experts."
        )
    slots = np.cumsum(routing_map, axis=1) - 1  # (T, E)
    experts, tokens = np.nonzero(routing_map.T)
    offsets = np.append(0, np.cumsum(routing_map.sum(axis=0)))
    routes = tokens * K + slots[tokens, experts]
    return plan_from_rows(function, "routing_map", offsets, routes, routing_map.shape[0], K)


def from_routing_probs(probs: HostArray, plan: DispatchPlan) -> HostArray:
    """Return the weight of every route from Megatron's ``probs``, 0 for routes without a row.

    Parameters
    ----------
    probs : (T, E) float array
    plan : DispatchPlan
        That of the map.

    Returns
    -------
    (T, K) float array
        Of the dtype of `probs`.

    Raises
    ------
    ShapeError
        If the probabilities are not of the plan.
    """
    axes = Axes("from_routing_probs")
    axes.bind("the plan", T=plan.num_tokens, E=plan.num_experts)
    axes.check("probs", probs, "T", "E")
    weights = np.zeros(plan.num_tokens * plan.top_k, probs.dtype)
    weights[plan.pair_ids[: plan.num_rows]] = probs[_pairs(plan)]
    return weights.reshape(plan.num_tokens, plan.top_k)


def from_capacity_slots(
    table: HostArray, *, num_tokens: int, top_k: int, capacity: int | None = None
) -> DispatchPlan:
    """Return the plan of experts' buffers: the inverse of `npmoe.dispatch.capacity_slots`.

    Parameters
    ----------
    table : (S, E, C) int array
        The route in every slot of every sequence's (or the only) buffers; T*K is an empty slot.
    num_tokens, top_k : int
        T and K.
    capacity : int, optional
        Rows that an expert may take, of all sequences together; None is S*C. A table of
        `capacity_slots` is only as wide as the slots in use.

    Returns
    -------
    DispatchPlan
        With a capacity and slots.

    Raises
    ------
    ShapeError
        If the table has not three axes.
    PlanError
        If a route is out of range, in two slots, or in another sequence's.
    """
    function = "from_capacity_slots"
    table = np.asarray(table)
    check_integer_ids(function, "table", table)
    if table.ndim != 3:
        raise ShapeError(
            f"{function}: table must have shape (S, E, C), got {table.shape}. S is 1 without "
            "sequences."
        )
    stretches, _, size = table.shape
    num_routes = num_tokens * top_k
    experts, stretch, slots = np.nonzero(table.transpose(1, 0, 2) != num_routes)
    routes = table[stretch, experts, slots].astype(np.int64)
    offsets = np.append(0, np.cumsum(np.bincount(experts, minlength=table.shape[1])))
    plan = plan_from_rows(function, "table", offsets, routes, num_tokens, top_k)
    home = routes // max(top_k, 1) * stretches // max(num_tokens, 1)
    strayed = np.flatnonzero(home != stretch)
    if strayed.size:
        i = strayed[0]
        raise PlanError(
            f"{function}: table must hold every route in the buffers of its own sequence, got "
            f"route {routes[i]} of sequence {home[i]} in those of {stretch[i]}."
        )
    slot_ids = np.full(num_routes, -1, np.int32)
    slot_ids[routes] = slots
    return DispatchPlan(
        pair_ids=plan.pair_ids,
        token_ids=plan.token_ids,
        row_ids=plan.row_ids,
        expert_offsets=plan.expert_offsets,
        num_tokens=num_tokens,
        top_k=top_k,
        capacity=stretches * size if capacity is None else capacity,
        slot_ids=slot_ids.reshape(num_tokens, top_k),
    )


def _pairs(plan: DispatchPlan) -> tuple[HostArray, HostArray]:
    """Return the token and the expert of every row."""
    experts = np.repeat(np.arange(plan.num_experts), plan.tokens_per_expert)
    return plan.token_ids[: plan.num_rows], experts
