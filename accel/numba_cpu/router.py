"""The usual router in one pass over each row: scores, choice and weights."""

from __future__ import annotations

import numpy as np

from .compiling import inner, kernel
from .curves import _exponential
from .rows import STEP
from .tickets import take_ticket


@kernel
def route_rows(
    tickets, thread, scratch, places, logits, num_experts, softmax, by_logits, among_chosen, bias,
    normalize, eps, eps_is_maximum, factor, probs, ids, weights, broken,
):  # fmt: skip
    """Write probs (T, N), ids and weights (T, K) of softmax or sigmoid top-k.

    Experts are chosen by their logits if `by_logits`, else by their scores, after `bias` if there
    is one; equal keys go to the lower expert. Weights are their scores, or with `among_chosen`
    the softmax of their logits alone. ``broken[0]`` is set if a row's largest logit is not
    finite, or its keys are not numbers: what is written for it then means nothing.
    """
    one, infinity = probs.dtype.type(1.0), probs.dtype.type(np.inf)
    top_k = ids.shape[1]
    while True:
        begin = take_ticket(tickets) * STEP
        if begin >= len(probs):
            return
        for t in range(begin, min(begin + STEP, len(probs))):
            x, p = logits[t * num_experts : (t + 1) * num_experts], probs[t]
            top, numbers = x[0], True
            for e in range(num_experts):
                numbers = numbers and x[e] == x[e]
                top = max(top, x[e])
            if not (numbers and abs(top) < infinity):
                broken[0] = 1
                continue
            if softmax:
                for e in range(num_experts):
                    p[e] = _exponential(x[e] - top)
                total = p[0]
                for e in range(1, num_experts):
                    total += p[e]
                for e in range(num_experts):
                    p[e] /= total
            else:
                for e in range(num_experts):
                    small = _exponential(-abs(x[e]))
                    p[e] = (one if x[e] >= 0 else small) / (one + small)
            last_key, last, best = infinity, -1, -1
            for k in range(top_k):
                best, best_key = -1, one
                for e in range(num_experts):
                    key = x[e] if by_logits else p[e]
                    if bias.size:
                        key += bias[e]
                    after = key < last_key or (key == last_key and e > last)
                    if after and (best < 0 or key > best_key):
                        best, best_key = e, key
                if best < 0:
                    broken[0] = 1
                    break
                ids[t, k], last, last_key = best, best, best_key
                weights[t, k] = p[best]
            if best < 0:
                continue
            if among_chosen:
                _softmax_chosen(x, ids[t], weights[t])
            if normalize:
                total = weights[t, 0]
                for k in range(1, top_k):
                    total += weights[t, k]
                divisor = max(total, eps) if eps_is_maximum else total + eps
                if divisor > 0:
                    for k in range(top_k):
                        weights[t, k] /= divisor
            for k in range(top_k):
                weights[t, k] *= factor


@inner
def _softmax_chosen(logits, ids, weights):
    """Write the softmax of the chosen logits; zeros if none of them can be chosen."""
    top = logits[ids[0]]
    for k in range(1, ids.size):
        top = max(top, logits[ids[k]])
    total = top - top
    for k in range(ids.size):
        weights[k] = _exponential(logits[ids[k]] - top)
        total += weights[k]
    for k in range(ids.size):
        weights[k] = weights[k] / total if total > 0 else weights.dtype.type(0.0)
