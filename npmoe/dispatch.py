"""DispatchPlan: which routes go to which expert, as one canonical CSR structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from npmoe._typing import Array, array_namespace
from npmoe.errors import PlanError


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
        Rows that an expert may take; None is dropless.
    """

    pair_ids: Array
    token_ids: Array
    row_ids: Array
    expert_offsets: Array
    num_tokens: int
    top_k: int
    capacity: int | None = None

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
    capacity: int | None = None,
    drop_policy: Literal["position", "probability"] = "position",
    topk_weights: Array | None = None,
) -> DispatchPlan:
    """Sort routes by expert and drop what exceeds the capacity.

    Parameters
    ----------
    topk_ids : (T, K) int32 array
        Chosen experts; -1 is no expert. Ids of one token must be distinct; that is not checked.
    num_experts : int
        E.
    capacity : int, optional
        Rows that an expert keeps; None keeps all.
    drop_policy : {"position", "probability"}
        Keep the first tokens, or the largest `topk_weights` (ties: the lower token).
    topk_weights : (T, K) float array, optional
        Needed by "probability" with a capacity.

    Returns
    -------
    DispatchPlan
        New arrays.

    Raises
    ------
    PlanError
        If an id is below -1 or not below E, or T*K does not fit int32, or weights are missing.

    Notes
    -----
    **Cost**: O(T*K + E) (radix sort; O(T*K log(T*K)) with more than 65,534 experts or by
    probability). **Order**: stable, hence bitwise reproducible.

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
    if num_routes >= 2**31:
        raise PlanError(
            f"plan_dispatch: topk_ids must hold fewer than 2**31 routes, got {num_routes}. "
            "Split the batch."
        )
    flat = topk_ids.reshape(-1)
    if num_routes and not bool(((flat >= -1) & (flat < num_experts)).all()):
        bad = flat[(flat < -1) | (flat >= num_experts)][0]
        raise PlanError(
            f"plan_dispatch: topk_ids must lie in -1..{num_experts - 1}, got {int(bad)}. "
            "-1 means no expert."
        )
    # Sixteen bits let NumPy's stable sort be a radix sort.
    key_dtype = xp.uint16 if num_experts < 2**16 - 1 else xp.int32
    key = xp.where(flat >= 0, flat, num_experts).astype(key_dtype)
    counts = xp.bincount(key, minlength=num_experts + 1)[:num_experts]
    if capacity is not None and drop_policy == "probability":
        if topk_weights is None:
            raise PlanError(
                "plan_dispatch: topk_weights must be given with drop_policy='probability', "
                "got None."
            )
        by_weight = xp.argsort(-topk_weights.reshape(-1), kind="stable")
        order = by_weight[xp.argsort(key[by_weight], kind="stable")]
    else:
        order = xp.argsort(key, kind="stable")
    starts = _exclusive_cumsum(xp, counts)
    num_valid = int(starts[-1])
    order = order[:num_valid]
    if capacity is not None and num_valid:
        rank = xp.arange(num_valid) - starts[key[order].astype(xp.int32)]
        order = order[rank < capacity]
        if drop_policy == "probability":
            order = xp.sort(order)
            order = order[xp.argsort(key[order], kind="stable")]
        starts = _exclusive_cumsum(xp, xp.minimum(counts, capacity))
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
        capacity=capacity,
    )


def _exclusive_cumsum(xp: Array, counts: Array) -> Array:
    """Return (E+1,) int32 offsets with a leading 0."""
    offsets = xp.zeros((counts.shape[0] + 1,), dtype=xp.int32)
    offsets[1:] = xp.cumsum(counts)
    return offsets
