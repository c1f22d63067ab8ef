"""How many routes an expert may take, and which it keeps."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig


def expert_capacity(num_tokens: int, cfg: MoEConfig) -> int | None:
    """Return the rows each expert may take, or None for as many as come.

    `num_tokens` counts the tokens that are not masked.
    """
    if cfg.expert_capacity is not None:
        return cfg.expert_capacity
    if cfg.capacity_factor is None:
        return None
    choices = num_tokens * cfg.top_k if cfg.capacity_count_top_k else num_tokens
    exact = choices * Fraction(cfg.capacity_factor) / cfg.num_experts
    if cfg.capacity_rounding == "ceil":
        capacity = math.ceil(exact)
    elif cfg.capacity_rounding == "floor":
        capacity = math.floor(exact)
    else:
        capacity = round(exact)
    capacity = max(capacity, cfg.min_capacity)
    while capacity % cfg.capacity_multiple != 0:
        capacity += 1
    return capacity


def keep_routes(
    topk_ids: HostArray, topk_weights: HostArray, capacity: int | None, cfg: MoEConfig
) -> HostArray:
    """Return which routes are kept, (T, K) bool.

    Each expert takes `capacity` routes: the first tokens ("position"), or the largest weights
    and the lower token among equals ("probability").
    """
    num_tokens, top_k = topk_ids.shape
    kept = np.zeros((num_tokens, top_k), dtype=bool)
    for e in range(cfg.num_experts):
        waiting = [(t, k) for t in range(num_tokens) for k in range(top_k) if topk_ids[t, k] == e]
        if cfg.drop_policy == "probability":
            waiting.sort(key=lambda route: (-topk_weights[route], route))
        for route in waiting[:capacity]:
            kept[route] = True
    return kept


def renormalize_kept(topk_weights: HostArray, kept: HostArray) -> HostArray:
    """Return w_k / (sum of the token's kept w) on kept routes, 0 elsewhere."""
    normalized = np.zeros(topk_weights.shape)
    for t in range(topk_weights.shape[0]):
        slots = [k for k in range(topk_weights.shape[1]) if kept[t, k]]
        total = sum(topk_weights[t, k] for k in slots)
        for k in slots:
            normalized[t, k] = topk_weights[t, k] / total if total > 0 else 0.0
    return normalized


def renormalize_kept_backward(
    grad_normalized: HostArray, topk_weights: HostArray, kept: HostArray
) -> HostArray:
    """Return the gradient of the weights before normalisation; `kept` is a constant."""
    normalized = renormalize_kept(topk_weights, kept)
    grad_topk_weights = np.zeros(topk_weights.shape)
    for t in range(topk_weights.shape[0]):
        slots = [k for k in range(topk_weights.shape[1]) if kept[t, k]]
        total = sum(topk_weights[t, k] for k in slots)
        mean = sum(grad_normalized[t, k] * normalized[t, k] for k in slots)
        for k in slots:
            if total > 0:
                grad_topk_weights[t, k] = (grad_normalized[t, k] - mean) / total
    return grad_topk_weights
