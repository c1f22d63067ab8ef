"""Combine weights: taken from the scores, normalised, and back."""

from __future__ import annotations

from npmoe._typing import Array, array_namespace
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.routing.result import Routing
from npmoe.routing.scoring import score, softmax_rows


def raw_weights(logits: Array, probs: Array, ids: Array, cfg: MoEConfig) -> Array:
    """Return the weights (T, K) before normalisation and scale; 0 where the id is -1.

    Always from unbiased values: recovered as (score + bias) - bias they would cancel.
    """
    xp = array_namespace(probs)
    chosen = ids >= 0
    if cfg.router_order == "score_topk" or cfg.score_fn != "softmax":
        if cfg.router_order == "score_topk":
            weights = take(probs, ids)
        else:
            weights = score(chosen_logits(logits, ids), cfg.score_fn)
        return xp.where(chosen, weights, xp.zeros_like(weights))
    some = chosen.any(axis=1, keepdims=True)
    inside = xp.where(chosen, take(logits, ids), -xp.inf)
    # A row that chose nothing, or only what can never be chosen, has no largest logit.
    some = some & xp.isfinite(inside.max(axis=1, keepdims=True))
    weights = softmax_rows(xp.where(some, inside, xp.zeros_like(inside)))
    return xp.where(chosen & some, weights, xp.zeros_like(weights))


def normalize_weights(weights: Array, cfg: MoEConfig) -> Array:
    """Divide rows (T, K) by their norm: ``w / (D + eps)`` or ``w / max(D, eps)``.

    A row of zeros stays a row of zeros.

    References
    ----------
    No eps: Mixtral in transformers; 1e-20 added: DeepSeek-V3; a maximum: ERNIE 4.5, Tutel; D the
    Euclidean norm: DBRX (``moe_normalize_expert_weights``).
    """
    xp = array_namespace(weights)
    _, divisor = _divisor(weights, cfg)
    return weights / xp.where(divisor > 0, divisor, xp.ones_like(divisor))


def normalize_weights_backward(grad: Array, weights: Array, cfg: MoEConfig) -> Array:
    """Return the gradient of the weights before normalisation.

    ``(grad - <grad, w / D'> (w / D)**(p - 1)) / D'`` with D' the divisor; where a maximum is at
    work, D' is constant and the second term is absent.
    """
    xp = array_namespace(weights)
    norm, divisor = _divisor(weights, cfg)
    positive = divisor > 0
    safe = xp.where(positive, divisor, xp.ones_like(divisor))
    # <grad, w/D>, not <grad, w>/D: a lone weight then gives exactly zero.
    inner = (grad * (weights / safe)).sum(axis=1, keepdims=True)
    if cfg.renorm_p == 2:
        inner = inner * (weights / xp.where(norm > 0, norm, xp.ones_like(norm)))
    if cfg.renorm_eps_mode == "max":
        inner = xp.where(norm >= cfg.renorm_eps, inner, xp.zeros_like(inner))
    return xp.where(positive, (grad - inner) / safe, xp.zeros_like(grad))


def _divisor(weights: Array, cfg: MoEConfig) -> tuple[Array, Array]:
    """Return the norm D of every row and what the row is divided by, both (T, 1)."""
    xp = array_namespace(weights)
    if cfg.renorm_p == 1:
        norm = weights.sum(axis=1, keepdims=True)
    else:
        # Relative to the largest, so that squares of small weights do not underflow.
        top = weights.max(axis=1, keepdims=True)
        ratio = weights / xp.where(top > 0, top, xp.ones_like(top))
        norm = top * xp.sqrt((ratio * ratio).sum(axis=1, keepdims=True))
    if not cfg.renorm_eps:
        return norm, norm
    eps = cfg.renorm_eps
    return norm, norm + eps if cfg.renorm_eps_mode == "add" else xp.maximum(norm, eps)


def kept_routes(routing: Routing, plan: DispatchPlan) -> Array:
    """Return which routes count after the drop (T, K): those with a row, and identity experts."""
    return (plan.row_ids >= 0) | (routing.topk_ids >= plan.num_experts)


def renormalize_kept(routing: Routing, plan: DispatchPlan, cfg: MoEConfig) -> Array:
    """Normalise each token's kept weights and scale them; dropped ones become 0.

    Parameters
    ----------
    routing : Routing
        Its topk_weights are those that stood at the drop.
    plan : DispatchPlan
        Says what was kept.
    cfg : MoEConfig
        Its renorm fields and routed_scaling_factor.

    Returns
    -------
    (T, K) float array
        New; without eps a lone survivor gets the scale, a token without survivors 0 everywhere.

    References
    ----------
    DeepSpeed ``sharded_moe.top2gating`` normalises after the drop, Tutel and Mixtral before.
    """
    xp = array_namespace(routing.topk_weights)
    weights = routing.topk_weights
    kept = xp.where(kept_routes(routing, plan), weights, xp.zeros_like(weights))
    weights = normalize_weights(kept, cfg)
    weights *= cfg.routed_scaling_factor
    return weights


def chosen_norms(routing: Routing, plan: DispatchPlan, cfg: MoEConfig) -> Array:
    """Return the norm D (T, 1) by which each token's weights were divided, before eps."""
    ids = routing.topk_ids if routing.summed_ids is None else routing.summed_ids
    xp = array_namespace(ids)
    weights = raw_weights(routing.router_logits, routing.probs, ids, cfg)
    if cfg.renormalize_drop == "after":
        weights = xp.where(kept_routes(routing, plan), weights, xp.zeros_like(weights))
    return _divisor(weights, cfg)[0]


def chosen_logits(logits: Array, ids: Array) -> Array:
    """Return the logits of the chosen (T, K); 0 where the id is -1, whatever the row holds."""
    xp = array_namespace(logits)
    return xp.where(ids >= 0, take(logits, ids), xp.zeros((1, 1), dtype=logits.dtype))


def take(values: Array, ids: Array) -> Array:
    """Return values[t, ids[t, k]] (T, K); entries of id -1 are arbitrary."""
    xp = array_namespace(values)
    return xp.take_along_axis(values, xp.maximum(ids, 0), axis=1)


def scatter_add(out: Array, ids: Array, values: Array) -> Array:
    """Add values[t, k] to out[t, ids[t, k]] in place; values of id -1 must be 0."""
    xp = array_namespace(out)
    rows = xp.arange(out.shape[0])
    # Column by column, since a -1 clipped to 0 may meet a true 0 of the same row.
    for k in range(ids.shape[1]):
        out[rows, xp.maximum(ids[:, k], 0)] += values[:, k]
    return out
