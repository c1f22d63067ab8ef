"""Importance and load losses of one batch: squared coefficients of variation over experts."""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import HostArray
from npmoe.naive.losses import normalized_score, normalized_score_backward, valid_tokens


def importance_loss(
    clean_logits: HostArray,
    token_mask: HostArray | None = None,
    *,
    variance: str = "population",
    score_fn: str = "softmax",
) -> tuple[float, HostArray]:
    """Return Var(I) / mean(I)^2 of I_e = sum_t p_te, and the gradient of the logits.

    p are the scores of the logits without noise, divided by their sum.
    """
    tokens = valid_tokens(clean_logits, token_mask)
    grad_logits = np.zeros(clean_logits.shape)
    rows = {t: clean_logits[t].tolist() for t in tokens}
    importance = [
        sum(normalized_score(rows[t], score_fn)[e] for t in tokens)
        for e in range(clean_logits.shape[1])
    ]
    value, grad = squared_variation(importance, variance)
    for t in tokens:
        grad_logits[t] = normalized_score_backward(grad, rows[t], score_fn)
    return value, grad_logits


def load_loss(
    logits: HostArray,
    clean_logits: HostArray,
    top_k: int,
    noise_std: float,
    token_mask: HostArray | None = None,
    *,
    variance: str = "population",
) -> tuple[float, HostArray]:
    """Return Var(L) / mean(L)^2 of L_e = mean_t (1 - Phi((threshold_t - clean_te) / noise_std)).

    The threshold is the K-th largest noisy logit of the token. The noise is a constant, so the
    gradient of the clean logits and that of the threshold's noisy logit add up.
    """
    tokens = valid_tokens(logits, token_mask)
    num_experts = logits.shape[1]
    grad_logits = np.zeros(logits.shape)
    load = [0.0] * num_experts
    for t in tokens:
        threshold = logits[t, _last_chosen(logits[t], top_k)]
        for e in range(num_experts):
            u = (threshold - clean_logits[t, e]) / noise_std
            load[e] += 0.5 * math.erfc(u / math.sqrt(2.0)) / len(tokens)
    value, grad_load = squared_variation(load, variance)
    for t in tokens:
        last = _last_chosen(logits[t], top_k)
        for e in range(num_experts):
            u = (logits[t, last] - clean_logits[t, e]) / noise_std
            density = math.exp(-0.5 * u * u) / math.sqrt(2.0 * math.pi)
            slope = grad_load[e] / len(tokens) * density / noise_std
            grad_logits[t, e] += slope
            grad_logits[t, last] -= slope
    return value, grad_logits


def squared_variation(amounts: list[float], variance: str) -> tuple[float, list[float]]:
    """Return Var / mean^2 and its gradient by each amount; 0 where the mean is 0."""
    size = len(amounts)
    divisor = size if variance == "population" else size - 1
    mean = sum(amounts) / size
    if mean == 0:
        return 0.0, [0.0] * size
    var = sum((a - mean) ** 2 for a in amounts) / divisor
    grad = [2 * (a - mean) / (divisor * mean**2) - 2 * var / (size * mean**3) for a in amounts]
    return var / mean**2, grad


def _last_chosen(row: HostArray, top_k: int) -> int:
    return sorted((-float(x), e) for e, x in enumerate(row))[top_k - 1][1]
