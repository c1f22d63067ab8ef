"""Auxiliary losses of one batch: each returns its value and the gradient of the logits.

A token that routing drops for its non-finite logits must be False in `token_mask`.
"""

from __future__ import annotations

import math

import numpy as np

from npmoe._typing import HostArray
from npmoe.naive.scoring import score, score_backward, softmax


def load_balancing_loss(
    logits: HostArray,
    topk_ids: HostArray,
    token_mask: HostArray | None = None,
    *,
    convention: str = "switch",
    counts: str = "pre_drop",
    score_fn: str = "softmax",
    kept: HostArray | None = None,
    sequence_length: int | None = None,
    window: tuple[HostArray, int, int] | None = None,
) -> tuple[float, HostArray]:
    """Return E * sum_e f_e P_e, which is 1 when everything is uniform (Switch), or its kin.

    f_e is the share of the choices that went to expert e, a constant for the gradient; P_e is
    the mean of its score divided by the sum of the token's scores ("hf": always of the softmax).

    Parameters
    ----------
    convention, counts : str
        As in `npmoe.losses.load_balancing_loss`, without defaults that depend on each other.
    kept : (T, K) bool array, optional
        Which routes survived the drop.
    sequence_length : int, optional
        Take the mean over sequences of this many tokens, empty ones left out.
    window : ((E,) int array, int, int), optional
        Counts, tokens and choices to use instead of those of this batch.
    """
    value, grad_logits = 0.0, np.zeros(logits.shape)
    length = max(1, logits.shape[0] if sequence_length is None else sequence_length)
    valid = valid_tokens(logits, token_mask)
    groups = [[t for t in valid if t // length == g] for g in range(logits.shape[0] // length)]
    groups = [group for group in groups if group]
    name = "softmax" if convention == "hf" else score_fn
    for group in groups:
        probs = {t: normalized_score(logits[t].tolist(), name) for t in group}
        mean = [sum(probs[t][e] for t in group) / len(group) for e in range(logits.shape[1])]
        load, tokens, choices = [0] * logits.shape[1], len(group), 0
        for t in group:
            chosen = _choices(probs[t], topk_ids[t], None if kept is None else kept[t], counts)
            choices += len(chosen)
            for e in chosen:
                if e >= 0:
                    load[e] += 1
        if window is not None:
            load, tokens, choices = window[0].tolist(), window[1], window[2]
        loss, grad_mean = _balance(convention, mean, load, tokens, choices)
        value += loss / len(groups)
        for t in group:
            grad = [g / (len(group) * len(groups)) for g in grad_mean]
            grad_logits[t] = normalized_score_backward(grad, logits[t].tolist(), name)
    return value, grad_logits


def _choices(probs: list[float], ids: HostArray, kept: HostArray | None, counts: str) -> list[int]:
    """Return what one token is counted for; -1 is a choice that was not made or not kept."""
    if counts == "top1":
        return [int(ids[0])]
    if counts == "unbiased_topk":
        return [e for _, e in sorted((-p, e) for e, p in enumerate(probs))[: len(ids)]]
    if counts == "pre_drop" or kept is None:
        return [int(e) for e in ids]
    return [int(e) if keep else -1 for e, keep in zip(ids, kept, strict=True)]


def _balance(
    convention: str, mean: list[float], load: list[int], tokens: int, choices: int
) -> tuple[float, list[float]]:
    """Return the loss of one group and its gradient by the mean probabilities."""
    size = len(mean)
    if convention == "prob_entropy":
        logs = [math.log(p) if p > 0 else 0.0 for p in mean]
        value = size * sum(p * log for p, log in zip(mean, logs, strict=True))
        return value, [size * (log + 1.0) for log in logs]
    if convention == "sonic":
        shares = [n / max(sum(load), 1) for n in load]
        total = sum(mean)
        inner = sum(f * p for f, p in zip(shares, mean, strict=True)) / total
        # The total is 1 whatever the logits, so it is a constant.
        return size * inner, [size * f / total for f in shares]
    divisor = tokens if convention in ("hf", "flaxformer") else choices
    factor = 1 if convention == "unscaled" else size
    grad = [factor * n / divisor for n in load]
    return sum(g * p for g, p in zip(grad, mean, strict=True)), grad


def normalized_score(row: list[float], name: str) -> list[float]:
    """Return the scores of a row divided by their sum."""
    scores = score(row, name)
    total = sum(scores)
    return [s / total if total > 0 else 0.0 for s in scores]


def normalized_score_backward(grad: list[float], row: list[float], name: str) -> list[float]:
    """Return the gradient of the logits: dp_i/ds_j = ([i = j] - p_i) / sum s."""
    total = sum(score(row, name))
    if total == 0:
        return [0.0] * len(row)
    inner = sum(g * p for g, p in zip(grad, normalized_score(row, name), strict=True))
    return score_backward([(g - inner) / total for g in grad], row, name)


def z_loss(logits: HostArray, token_mask: HostArray | None = None) -> tuple[float, HostArray]:
    """Return the mean over tokens of (ln sum_e exp x_e)^2."""
    tokens = valid_tokens(logits, token_mask)
    value, grad_logits = 0.0, np.zeros(logits.shape)
    for t in tokens:
        row = [float(x) for x in logits[t]]
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in row))
        value += log_sum**2 / len(tokens)
        for e, p in enumerate(softmax(row)):
            grad_logits[t, e] = 2.0 * log_sum * p / len(tokens)
    return value, grad_logits


def entropy_loss(
    logits: HostArray, token_mask: HostArray | None = None, *, score_fn: str = "softmax"
) -> tuple[float, HostArray]:
    """Return the mean over tokens of -sum_e p_e ln p_e, with 0 ln 0 = 0."""
    tokens = valid_tokens(logits, token_mask)
    value, grad_logits = 0.0, np.zeros(logits.shape)
    for t in tokens:
        row = logits[t].tolist()
        logs = [math.log(p) if p > 0 else 0.0 for p in normalized_score(row, score_fn)]
        value -= sum(math.exp(g) * g for g in logs) / len(tokens)
        # The 1 in d(p ln p)/dp = ln p + 1 falls out, since every row sums to 1.
        grad = [-log / len(tokens) for log in logs]
        grad_logits[t] = normalized_score_backward(grad, row, score_fn)
    return value, grad_logits


def valid_tokens(logits: HostArray, token_mask: HostArray | None) -> list[int]:
    """Return the tokens that count."""
    return [t for t in range(logits.shape[0]) if token_mask is None or token_mask[t]]
