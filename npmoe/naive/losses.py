"""Auxiliary losses of one batch: each returns its value and the gradient of the logits.

A token that routing drops for its non-finite logits must be False in `token_mask`.
"""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import HostArray
from npmoe.naive.routing import softmax


def load_balancing_loss(
    logits: HostArray, topk_ids: HostArray, token_mask: HostArray | None = None
) -> tuple[float, HostArray]:
    """Return E * sum_e f_e P_e, which is 1 when everything is uniform (Switch).

    f_e is the share of the T * K choices that went to expert e, a constant for the gradient;
    P_e is the mean probability of expert e.
    """
    num_experts, top_k = logits.shape[1], topk_ids.shape[1]
    tokens = _valid_tokens(logits, token_mask)
    grad_logits = np.zeros(logits.shape)
    value = 0.0
    counts = [0] * num_experts
    for t in tokens:
        for k in range(top_k):
            if topk_ids[t, k] >= 0:
                counts[topk_ids[t, k]] += 1
    for t in tokens:
        probs = softmax([float(x) for x in logits[t]])
        shares = [count / (len(tokens) * top_k) for count in counts]
        grad_probs = [num_experts * share / len(tokens) for share in shares]
        mean = sum(g * p for g, p in zip(grad_probs, probs, strict=True))
        value += mean
        for e in range(num_experts):
            grad_logits[t, e] = probs[e] * (grad_probs[e] - mean)
    return value, grad_logits


def z_loss(logits: HostArray, token_mask: HostArray | None = None) -> tuple[float, HostArray]:
    """Return the mean over tokens of (ln sum_e exp x_e)^2."""
    tokens = _valid_tokens(logits, token_mask)
    grad_logits = np.zeros(logits.shape)
    value = 0.0
    for t in tokens:
        row = [float(x) for x in logits[t]]
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in row))
        value += log_sum**2 / len(tokens)
        for e, p in enumerate(softmax(row)):
            grad_logits[t, e] = 2.0 * log_sum * p / len(tokens)
    return value, grad_logits


def entropy_loss(logits: HostArray, token_mask: HostArray | None = None) -> tuple[float, HostArray]:
    """Return the mean over tokens of -sum_e p_e ln p_e, with 0 ln 0 = 0."""
    tokens = _valid_tokens(logits, token_mask)
    grad_logits = np.zeros(logits.shape)
    value = 0.0
    for t in tokens:
        probs = softmax([float(x) for x in logits[t]])
        entropy = -sum(p * math.log(p) for p in probs if p > 0)
        value += entropy / len(tokens)
        for e, p in enumerate(probs):
            if p > 0:
                grad_logits[t, e] = -p * (math.log(p) + entropy) / len(tokens)
    return value, grad_logits


def _valid_tokens(logits: HostArray, token_mask: HostArray | None) -> list[int]:
    return [t for t in range(logits.shape[0]) if token_mask is None or token_mask[t]]
