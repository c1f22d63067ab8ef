"""Which experts a token goes to, with which weights: one token at a time, in float64."""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive.capacity import renormalize_kept, renormalize_kept_backward


def softmax(row: list[float]) -> list[float]:
    """Return exp(x_e) / sum exp(x); zeros where every x is -inf."""
    largest = max(row, default=-math.inf)
    if largest == -math.inf:
        return [0.0] * len(row)
    powers = [math.exp(x - largest) for x in row]
    return [power / sum(powers) for power in powers]


def is_finite_row(row: HostArray) -> bool:
    """Return whether the largest logit is neither NaN nor infinite; a single -inf is legal."""
    return not any(math.isnan(x) for x in row) and math.isfinite(max(row))


def valid_tokens(logits: HostArray, cfg: MoEConfig, token_mask: HostArray | None) -> list[bool]:
    """Return which tokens take part: not masked, and no non-finite row under nan_policy "drop"."""
    valid = []
    for t in range(logits.shape[0]):
        masked = token_mask is not None and not token_mask[t]
        broken = not masked and not is_finite_row(logits[t])
        if broken and cfg.nan_policy == "raise":
            raise RangeError(
                f"route: logits must have a finite largest value in every row, got {logits[t]} "
                f"for token {t}. Mask the token or choose another nan_policy."
            )
        valid.append(not masked and not (broken and cfg.nan_policy == "drop"))
    return valid


def route(
    logits: HostArray,
    cfg: MoEConfig,
    token_mask: HostArray | None = None,
    topk_ids: HostArray | None = None,
) -> tuple[HostArray, HostArray, HostArray]:
    """Choose the experts of every token.

    Parameters
    ----------
    logits : (T, E) float array
        Router logits.
    cfg : MoEConfig
        Uses top_k, router_order, renormalize, renormalize_drop and nan_policy.
    token_mask : (T,) bool array, optional
        False rows are never looked at.
    topk_ids : (T, K) int array, optional
        Choices to replay instead of choosing; -1 is no expert.

    Returns
    -------
    topk_ids : (T, K) int64 array
        By falling key, the lowest id first among equals; -1 where masked.
    topk_weights : (T, K) float64 array
        0 where there is no expert. With renormalize_drop="after" neither normalised nor scaled.
    probs : (T, E) float64 array
        Softmax of the logits; 0 where masked or not finite.

    Raises
    ------
    RangeError
        If the largest logit of a row is NaN or infinite and nan_policy is "raise".
    """
    num_tokens, num_experts = logits.shape
    top_k = cfg.top_k if topk_ids is None else topk_ids.shape[1]
    ids = np.full((num_tokens, top_k), -1)
    weights = np.zeros((num_tokens, top_k))
    probs = np.zeros((num_tokens, num_experts))
    for t, valid in enumerate(valid_tokens(logits, cfg, token_mask)):
        if not valid:
            continue
        row = logits[t].tolist() if is_finite_row(logits[t]) else [-math.inf] * num_experts
        probs[t] = softmax(row)
        key = row if cfg.router_order == "topk_score" else probs[t]
        by_key = sorted((-key[e], e) for e in range(num_experts))
        ids[t] = [e for _, e in by_key[:top_k]] if topk_ids is None else topk_ids[t]
        slots = [k for k in range(top_k) if ids[t, k] >= 0]
        if cfg.router_order == "topk_score":
            weights[t, slots] = softmax([row[ids[t, k]] for k in slots])
        else:
            weights[t, slots] = [probs[t, ids[t, k]] for k in slots]
    if cfg.renormalize_drop == "before":
        if cfg.renormalize:
            weights = renormalize_kept(weights, ids >= 0)
        weights = weights * cfg.routed_scaling_factor
    return ids, weights, probs


def route_backward(
    grad_topk_weights: HostArray,
    logits: HostArray,
    topk_ids: HostArray,
    cfg: MoEConfig,
    kept: HostArray | None = None,
) -> HostArray:
    """Return the gradient of the logits (T, E); the choice itself is a constant.

    With `kept` (T, K), `grad_topk_weights` is the gradient of the weights after the drop: a
    dropped route has none, and with renormalize_drop="after" the kept ones were normalised and
    scaled.
    """
    chosen = topk_ids >= 0
    grad = np.where(chosen if kept is None else kept, grad_topk_weights, 0.0)
    if cfg.renormalize_drop == "before" or kept is not None:
        grad = grad * cfg.routed_scaling_factor
    grad_logits = np.zeros(logits.shape)
    for t in range(logits.shape[0]):
        if not is_finite_row(logits[t]):
            continue
        slots = [k for k in range(topk_ids.shape[1]) if chosen[t, k]]
        experts = [int(topk_ids[t, k]) for k in slots]
        row = logits[t].tolist()
        if cfg.router_order == "topk_score":
            p = softmax([row[e] for e in experts])
            mean = sum(grad[t, k] * p[i] for i, k in enumerate(slots))
            for i, k in enumerate(slots):
                grad_logits[t, experts[i]] += p[i] * (grad[t, k] - mean)
            continue
        p = softmax(row)
        grad_chosen = grad[t : t + 1, slots]
        if cfg.renormalize and (cfg.renormalize_drop == "before" or kept is not None):
            summed = chosen if cfg.renormalize_drop == "before" or kept is None else kept
            raw = np.array([[p[e] for e in experts]])
            grad_chosen = renormalize_kept_backward(grad_chosen, raw, summed[t : t + 1, slots])
        grad_probs = [0.0] * len(p)
        for i, e in enumerate(experts):
            grad_probs[e] += grad_chosen[0, i]
        mean = sum(g * q for g, q in zip(grad_probs, p, strict=True))
        for e, q in enumerate(p):
            grad_logits[t, e] = q * (grad_probs[e] - mean)
    return grad_logits
