"""How many rows an expert may take, and the normalisation that follows a drop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from npmoe._typing import Array, array_namespace
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan

if TYPE_CHECKING:
    from fractions import Fraction

_ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "ceil": math.ceil,
    "floor": math.floor,
    "round": round,
}


def expert_capacity(num_tokens: int, cfg: MoEConfig) -> int | None:
    """Return the number of rows that each expert may take, or None if dropless.

    ``C = round_up(max(min_capacity, round(T * K * capacity_factor / E)), capacity_multiple)``

    Parameters
    ----------
    num_tokens : int
        T, counting valid tokens only.
    cfg : MoEConfig
        Its capacity fields; `expert_capacity` is returned as it stands.

    Returns
    -------
    int or None

    Notes
    -----
    **Accuracy**: exact rational arithmetic. Floating-point versions in circulation differ, for
    example 56 instead of 55 for T=400, E=8, K=1 and a factor of 1.1.

    References
    ----------
    Fedus et al. 2021, "Switch Transformers", eq. 3.

    Examples
    --------
    >>> cfg = MoEConfig(num_experts=8, top_k=1, capacity_factor="1.1")
    >>> expert_capacity(400, cfg)
    55
    """
    if cfg.expert_capacity is not None:
        return cfg.expert_capacity
    if cfg.capacity_factor is None:
        return None
    from fractions import Fraction  # noqa: PLC0415  # slow to import, and a capacity is rare

    per_token = cfg.top_k if cfg.capacity_count_top_k else 1
    share = num_tokens * per_token * Fraction(cfg.capacity_factor) / cfg.num_experts
    rows = max(cfg.min_capacity, _ROUNDINGS[cfg.capacity_rounding](share))
    return -(-rows // cfg.capacity_multiple) * cfg.capacity_multiple


def renormalize_kept(topk_weights: Array, plan: DispatchPlan, *, scale: float = 1.0) -> Array:
    """Divide each token's kept weights by their sum; dropped ones become 0.

    Parameters
    ----------
    topk_weights : (T, K) float array
        Weights as they stood at the drop.
    plan : DispatchPlan
        Its `row_ids` say what was kept.
    scale : float
        Multiplies the result: the config's routed_scaling_factor.

    Returns
    -------
    (T, K) float array
        New; a lone survivor gets `scale`, a token without survivors 0 everywhere.

    References
    ----------
    DeepSpeed ``sharded_moe.top2gating`` normalises after the drop, Tutel and Mixtral before.
    """
    xp = array_namespace(topk_weights)
    kept = xp.where(plan.row_ids >= 0, topk_weights, xp.zeros_like(topk_weights))
    weights = divide_by_sum(kept)
    weights *= scale
    return weights


def divide_by_sum(weights: Array) -> Array:
    """Divide rows (T, K) by their sums; a row of zeros stays a row of zeros."""
    xp = array_namespace(weights)
    total = weights.sum(axis=1, keepdims=True)
    return weights / xp.where(total > 0, total, xp.ones_like(total))


def divide_by_sum_backward(grad: Array, weights: Array) -> Array:
    """Return the gradient of `weights`: (grad - <grad, w/D>) / D with D = sum of the row."""
    xp = array_namespace(weights)
    total = weights.sum(axis=1, keepdims=True)
    divisor = xp.where(total > 0, total, xp.ones_like(total))
    # <grad, w/D>, not <grad, w>/D: a lone weight then gives exactly zero.
    inner = (grad * (weights / divisor)).sum(axis=1, keepdims=True)
    return xp.where(total > 0, (grad - inner) / divisor, xp.zeros_like(grad))
