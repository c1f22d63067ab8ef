"""A token's combine weights: the scores of its experts, and their normalisation."""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive.scoring import score, score_backward


def chosen_weights(row: list[float], experts: list[int], cfg: MoEConfig) -> list[float]:
    """Return the weights of a token's experts before any normalisation.

    Their scores among all experts, or with router_order="topk_score" among themselves.
    """
    if cfg.router_order == "topk_score":
        return score([row[e] for e in experts], cfg.score_fn)
    scores_of_all = score(row, cfg.score_fn)
    return [scores_of_all[e] for e in experts]


def chosen_weights_backward(
    grad: list[float], row: list[float], experts: list[int], cfg: MoEConfig
) -> list[float]:
    """Return the gradient of the token's logits (E,)."""
    grad_row = [0.0] * len(row)
    if cfg.router_order == "topk_score":
        grad_chosen = score_backward(grad, [row[e] for e in experts], cfg.score_fn)
        for e, g in zip(experts, grad_chosen, strict=True):
            grad_row[e] += g
        return grad_row
    for e, g in zip(experts, grad, strict=True):
        grad_row[e] += g
    return score_backward(grad_row, row, cfg.score_fn)


def renormalizes(top_k: int, cfg: MoEConfig) -> bool:
    """Return whether weights of `top_k` choices are normalised at all."""
    return cfg.renormalize and (top_k > 1 or cfg.renorm_single)


def norm(weights: list[float], cfg: MoEConfig) -> float:
    """Return D = (sum w^p)^(1/p) for p = 1 or 2."""
    return sum(weights) if cfg.renorm_p == 1 else math.hypot(*weights)


def divisor(weights: list[float], cfg: MoEConfig) -> float:
    """Return D + eps or max(D, eps)."""
    total = norm(weights, cfg)
    return total + cfg.renorm_eps if cfg.renorm_eps_mode == "add" else max(total, cfg.renorm_eps)


def renormalize(topk_weights: HostArray, summed: HostArray, cfg: MoEConfig) -> HostArray:
    """Return w / divisor on the `summed` routes of each token (T, K), 0 elsewhere.

    Without normalisation the summed weights come back as they are. A divisor of 0 gives zeros.
    """
    normalized = np.zeros(topk_weights.shape)
    for t in range(topk_weights.shape[0]):
        slots = [k for k in range(topk_weights.shape[1]) if summed[t, k]]
        w = [float(topk_weights[t, k]) for k in slots]
        below = divisor(w, cfg) if renormalizes(topk_weights.shape[1], cfg) else 1.0
        for i, k in enumerate(slots):
            normalized[t, k] = w[i] / below if below > 0 else 0.0
    return normalized


def renormalize_backward(
    grad_normalized: HostArray, topk_weights: HostArray, summed: HostArray, cfg: MoEConfig
) -> HostArray:
    """Return the gradient of `topk_weights`; `summed` is a constant.

    With v = w / N and N = D + eps: (grad - (w / D)^(p-1) sum grad v) / N. Where eps > D stands
    in for D, N is a constant. Where N = 0 the weights are constants.
    """
    grad_topk_weights = np.zeros(topk_weights.shape)
    for t in range(topk_weights.shape[0]):
        slots = [k for k in range(topk_weights.shape[1]) if summed[t, k]]
        if not renormalizes(topk_weights.shape[1], cfg):
            grad_topk_weights[t, slots] = grad_normalized[t, slots]
            continue
        w = [float(topk_weights[t, k]) for k in slots]
        total, below = norm(w, cfg), divisor(w, cfg)
        if below == 0:
            continue
        clamped = cfg.renorm_eps_mode == "max" and total < cfg.renorm_eps
        # <grad, w / N> and not <grad, w> / N: a lone weight then gives exactly zero.
        mean = sum(grad_normalized[t, k] * (w[i] / below) for i, k in enumerate(slots))
        if clamped:
            mean = 0.0
        for i, k in enumerate(slots):
            slope = 1.0 if cfg.renorm_p == 1 or total == 0 else w[i] / total
            grad_topk_weights[t, k] = (grad_normalized[t, k] - slope * mean) / below
    return grad_topk_weights
