"""How often each expert was chosen, by each of the meanings that "chosen" has."""

from __future__ import annotations

from npmoe._typing import Array, array_namespace
from npmoe.dispatch import DispatchPlan
from npmoe.errors import PlanError, RangeError, ShapeError
from npmoe.losses.conventions import COUNT_SOURCES, CountSource, check_choice
from npmoe.routing import Routing, stable_topk
from npmoe.routing.weights import kept_routes


def count_choices(
    function: str,
    routing: Routing,
    counts: CountSource,
    *,
    plan: DispatchPlan | None = None,
    probs: Array | None = None,
    num_groups: int = 1,
) -> tuple[Array, int]:
    """Count the choices of every expert in each of `num_groups` equal runs of tokens.

    "pre_drop": all ids. "top1": the first column. "post_drop": what the plan kept. "executed":
    that if there is a plan, else all ids. "unbiased_topk": a fresh top-k of `probs`, by default
    `routing.probs`, without bias and groups.

    Returns
    -------
    counts : (num_groups, E) int64 array
    choices_per_token : int
        K, or 1 for "top1".
    """
    check_choice(function, "counts", counts, COUNT_SOURCES)
    ids, num_experts = routing.topk_ids, routing.probs.shape[1]
    xp = array_namespace(ids)
    if counts == "post_drop" and plan is None:
        raise RangeError(
            f"{function}: plan must be given with counts='post_drop', got None. "
            "Pass saved.plan, or choose counts='pre_drop'."
        )
    if counts == "top1":
        ids = ids[:, :1]
    elif counts == "unbiased_topk":
        ids = stable_topk(routing.probs if probs is None else probs, ids.shape[1])
    elif counts in ("post_drop", "executed") and plan is not None:
        if tuple(plan.row_ids.shape) != tuple(ids.shape):
            raise ShapeError(
                f"{function}: plan.row_ids must have shape (T, K) = {tuple(ids.shape)}, got "
                f"{tuple(plan.row_ids.shape)}. T, K are bound by routing.topk_ids. "
                "Pass the plan of the same call."
            )
        ids = xp.where(kept_routes(routing, plan), ids, -1)
    if ids.size and int(ids.max()) >= num_experts:
        raise PlanError(
            f"{function}: routing.topk_ids must lie in -1..{num_experts - 1}, got "
            f"{int(ids.max())}. E is bound by routing.probs."
        )
    if routing.token_mask is not None:
        ids = xp.where(routing.token_mask[:, None], ids, -1)
    group = xp.arange(ids.shape[0]) // max(ids.shape[0] // num_groups, 1)
    key = (ids + 1 + group[:, None] * (num_experts + 1)).reshape(-1)
    histogram = xp.bincount(key, minlength=num_groups * (num_experts + 1))
    return histogram.reshape(num_groups, num_experts + 1)[:, 1:], ids.shape[1]
