"""DispatchPlan: which routes go to which expert, as one canonical CSR structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.config import DropPolicy, SlotOrder
from npmoe.errors import PlanError, RangeError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchPlan:
    """Rows in expert order, and the way there and back.

    Route ``p = t*K + k`` is slot k of token t. Rows are ordered by expert, inside an expert by
    route.

    Attributes
    ----------
    pair_ids : (R,) int32 array
        The route of every row; a device backend may append -1 up to T*K entries.
    token_ids : (R,) int32 array
        The token of every row.
    row_ids : (T, K) int32 array
        The row of every route, or -1 if it was dropped or not routed.
    expert_offsets : (E+1,) int32 array
        Rows of expert e are ``expert_offsets[e]:expert_offsets[e+1]``.
    num_tokens, top_k : int
        T and K.
    capacity : int or None
        Rows that an expert may take, of all sequences together; None is dropless.
    slot_ids : (T, K) int32 array or None
        The slot of every route in its expert's buffer (of its sequence, if sequences have their
        own), -1 where it has no row; None if dropless.
    """

    pair_ids: Array
    token_ids: Array
    row_ids: Array
    expert_offsets: Array
    num_tokens: int
    top_k: int
    capacity: int | None = None
    slot_ids: Array | None = None

    @property
    def num_rows(self) -> int:
        """R, the number of kept rows (reads one number off the device)."""
        return int(self.expert_offsets[-1])

    @property
    def num_experts(self) -> int:
        """E, or the number of local experts."""
        return int(self.expert_offsets.shape[0]) - 1

    @property
    def tokens_per_expert(self) -> Array:
        """Kept rows of every expert (E,)."""
        return self.expert_offsets[1:] - self.expert_offsets[:-1]


def plan_dispatch(
    topk_ids: Array,
    *,
    num_experts: int,
    num_identity_experts: int = 0,
    capacity: int | Sequence[int] | None = None,
    drop_policy: DropPolicy = "position",
    slot_order: SlotOrder = "priority",
    topk_weights: Array | None = None,
    rng: np.random.Generator | None = None,
) -> DispatchPlan:
    """Sort routes by expert and drop what exceeds the capacity.

    Parameters
    ----------
    topk_ids : (T, K) int32 array
        Chosen experts; -1 is no expert. Ids of one token must be distinct; that is not checked.
    num_experts : int
        E.
    num_identity_experts : int
        Ids from E on that are legal and get no row.
    capacity : int or sequence of int, optional
        Rows that an expert keeps, or rows that it keeps of each of as many equal stretches of
        tokens; None keeps all.
    drop_policy : {"position", "k_major", "batch_priority", "probability", "random"}
        In which order routes ask for rows: by token; all first choices before any second; the
        same with tokens by falling first weight; by falling weight; at random. Ties: the lower
        token.
    slot_order : {"priority", "token"}
        Whether slots are numbered in that order or by token.
    topk_weights : (T, K) float array, optional
        Needed by "batch_priority" and "probability" with a capacity.
    rng : numpy Generator, optional
        Needed by "random" with a capacity; T*K uniform numbers are drawn.

    Returns
    -------
    DispatchPlan
        New arrays.

    Raises
    ------
    PlanError
        If an id is out of range, or T*K does not fit int32, or weights are missing.
    RangeError
        If the generator is missing.

    Notes
    -----
    **Cost**: O(T*K + E) by token, up to 65,534 experts (radix sort), else O(T*K log(T*K)).
    **Order**: stable, hence bitwise reproducible.

    References
    ----------
    "position": Switch, Megatron; "k_major": GShard, Tutel; "batch_priority": Riquelme et al.
    2021, "V-MoE", section 4.1; "probability": Megatron and DeepSpeed ``probs``; "random":
    DeepSpeed ``use_rts``, which numbers slots by token.

    Examples
    --------
    >>> import numpy as np
    >>> plan = plan_dispatch(np.array([[2, 0], [2, 1], [0, 2]], np.int32), num_experts=4)
    >>> plan.pair_ids.tolist(), plan.expert_offsets.tolist()
    ([1, 4, 3, 0, 2, 5], [0, 2, 3, 6, 6])
    """
    xp = array_namespace(topk_ids)
    num_tokens, top_k = topk_ids.shape
    num_routes = num_tokens * top_k
    flat = topk_ids.reshape(-1)
    _check_ids(flat, num_experts + num_identity_experts)
    key = xp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    # Sixteen bits let NumPy's stable sort be a radix sort.
    key = key.astype(xp.uint16 if num_experts < 2**16 - 1 else xp.int32)
    counts = xp.bincount(key, minlength=num_experts + 1)[:num_experts]
    starts = _exclusive_cumsum(xp, counts)
    slot_ids, rows_allowed = None, None
    if capacity is None:
        order = xp.argsort(key, kind="stable")[: int(starts[-1])]
    else:
        limits = [capacity] if isinstance(capacity, int) else list(capacity)
        rows_allowed = sum(limits)
        asking = _asking_order(topk_ids, drop_policy, topk_weights, rng)
        order, slots = _admit(key, asking, limits, num_experts, by_token=slot_order == "token")
        counts = xp.bincount(key[order], minlength=num_experts)[:num_experts]
        starts = _exclusive_cumsum(xp, counts)
        slot_ids = xp.full((num_routes,), -1, dtype=xp.int32)
        slot_ids[order] = slots.astype(xp.int32)
        slot_ids = slot_ids.reshape(num_tokens, top_k)
    pair_ids = order.astype(xp.int32)
    row_ids = xp.full((num_routes,), -1, dtype=xp.int32)
    row_ids[pair_ids] = xp.arange(pair_ids.shape[0], dtype=xp.int32)
    return DispatchPlan(
        pair_ids=pair_ids,
        token_ids=pair_ids // max(top_k, 1),
        row_ids=row_ids.reshape(num_tokens, top_k),
        expert_offsets=starts,
        num_tokens=num_tokens,
        top_k=top_k,
        capacity=rows_allowed,
        slot_ids=slot_ids,
    )


def capacity_slots(plan: DispatchPlan, *, stretches: int = 1) -> Array:
    """Return the padded buffers of a plan with a capacity: which route sits in which slot.

    Parameters
    ----------
    plan : DispatchPlan
        One made with a capacity.
    stretches : int
        S, the number of capacities that it was made with: sequences, for capacity_scope
        "sequence".

    Returns
    -------
    (S, E, C) int32 array
        Routes, and T*K in empty slots; C is the largest number of slots in use. Empty slots are
        padding only: they enter neither counts nor losses.

    Raises
    ------
    PlanError
        If the plan is dropless, or was made with other stretches.

    Examples
    --------
    >>> import numpy as np
    >>> ids = np.array([[2, 0], [2, 1], [0, 2]], np.int32)
    >>> capacity_slots(plan_dispatch(ids, num_experts=3, capacity=2)).tolist()
    [[[1, 4], [3, 6], [0, 2]]]
    """
    if plan.slot_ids is None:
        raise PlanError("capacity_slots: plan must have a capacity, got a dropless one.")
    xp = array_namespace(plan.slot_ids)
    routes = plan.pair_ids[: plan.num_rows]
    slots = plan.slot_ids.reshape(-1)[routes]
    size = int(slots.max()) + 1 if plan.num_rows else 0
    experts = xp.repeat(xp.arange(plan.num_experts), plan.tokens_per_expert)
    stretch = plan.token_ids[: plan.num_rows] * stretches // max(1, plan.num_tokens)
    num_routes = plan.num_tokens * plan.top_k
    table = xp.full((stretches, plan.num_experts, size), num_routes, dtype=xp.int32)
    table[stretch, experts, slots] = routes
    if int((table < num_routes).sum()) != plan.num_rows:
        raise PlanError(
            f"capacity_slots: stretches must be those of the plan, got {stretches}. Two routes "
            "share a slot."
        )
    return table


def _check_ids(flat: Array, size: int) -> None:
    num_routes = flat.shape[0]
    if num_routes >= 2**31:
        raise PlanError(
            f"plan_dispatch: topk_ids must hold fewer than 2**31 routes, got {num_routes}. "
            "Split the batch."
        )
    if num_routes and not bool(((flat >= -1) & (flat < size)).all()):
        bad = flat[(flat < -1) | (flat >= size)][0]
        raise PlanError(
            f"plan_dispatch: topk_ids must lie in -1..{size - 1}, got {int(bad)}. "
            "-1 means no expert."
        )


def _asking_order(
    topk_ids: Array,
    drop_policy: DropPolicy,
    topk_weights: Array | None,
    rng: np.random.Generator | None,
) -> Array | None:
    """Return all routes (T*K,) in the order in which they ask for rows; None is by token."""
    xp = array_namespace(topk_ids)
    num_tokens, top_k = topk_ids.shape
    if drop_policy == "position":
        return None
    if drop_policy == "random":
        if rng is None:
            raise RangeError(
                "plan_dispatch: rng must be given with drop_policy='random', got None. Pass a "
                "numpy Generator, or use cfg.for_evaluation()."
            )
        return xp.argsort(xp.asarray(rng.random(num_tokens * top_k)), kind="stable")
    tokens = xp.arange(num_tokens)
    if drop_policy != "k_major":
        if topk_weights is None:
            raise PlanError(
                f"plan_dispatch: topk_weights must be given with drop_policy={drop_policy!r}, "
                "got None."
            )
        if drop_policy == "probability":
            return xp.argsort(-topk_weights.reshape(-1), kind="stable")
        tokens = xp.argsort(-topk_weights[:, 0], kind="stable")
    return (tokens[None, :] * top_k + xp.arange(top_k)[:, None]).reshape(-1)


def _admit(
    key: Array, asking: Array | None, limits: list[int], num_experts: int, *, by_token: bool
) -> tuple[Array, Array]:
    """Return the admitted routes, by expert and route, and the slot of each.

    `key` is the expert of every route, num_experts for none; each of the equal stretches of
    tokens has its own limit.
    """
    xp = array_namespace(key)
    num_routes, stretches = key.shape[0], max(1, len(limits))
    queue = key
    if stretches > 1 and num_routes:
        # One queue per stretch and expert; routes without an expert share the last one.
        stretch = xp.arange(num_routes) // (num_routes // stretches)
        queue = xp.where(key < num_experts, stretch * num_experts + key, stretches * num_experts)
    last = stretches * num_experts
    order = _by_queue(queue, asking, last)
    rank = _rank(queue, order, last)
    limit = xp.asarray(np.repeat(np.array(limits or [0], np.int64), num_experts))
    admitted = rank < limit[queue[order]]
    order, slots = order[admitted], rank[admitted]
    if asking is None and stretches == 1:
        return order, slots
    if by_token:
        order = xp.sort(order)
        order = order[xp.argsort(queue[order], kind="stable")]
        slots = _rank(queue, order, last)
    by_route = xp.argsort(order, kind="stable")
    order, slots = order[by_route], slots[by_route]
    by_expert = xp.argsort(key[order], kind="stable")
    return order[by_expert], slots[by_expert]


def _by_queue(queue: Array, asking: Array | None, last: int) -> Array:
    """Return the routes that have a queue, by queue and, inside it, in asking order."""
    xp = array_namespace(queue)
    if asking is None:
        order = xp.argsort(queue, kind="stable")
    else:
        order = asking[xp.argsort(queue[asking], kind="stable")]
    return order[: int((queue < last).sum())]


def _rank(queue: Array, order: Array, last: int) -> Array:
    """Return the place of every route of `order`, which is grouped by queue, in its queue."""
    xp = array_namespace(queue)
    starts = _exclusive_cumsum(xp, xp.bincount(queue[order], minlength=last))
    return xp.arange(order.shape[0]) - starts[queue[order].astype(xp.int64)]


def _exclusive_cumsum(xp: Array, counts: Array) -> Array:
    """Return (E+1,) int32 offsets with a leading 0."""
    offsets = xp.zeros((counts.shape[0] + 1,), dtype=xp.int32)
    offsets[1:] = xp.cumsum(counts)
    return offsets
