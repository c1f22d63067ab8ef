"""Score functions of one row of router logits, and their derivatives, one number at a time."""

from __future__ import annotations

import math

from npmoe._typing import HostArray


def softmax(row: list[float]) -> list[float]:
    """Return exp(x_e) / sum exp(x); zeros where every x is -inf."""
    largest = max(row, default=-math.inf)
    if largest == -math.inf:
        return [0.0] * len(row)
    powers = [math.exp(x - largest) for x in row]
    return [power / sum(powers) for power in powers]


def softmax_backward(grad_probs: list[float], probs: list[float]) -> list[float]:
    """Return p_e (grad_e - sum grad p)."""
    mean = sum(g * p for g, p in zip(grad_probs, probs, strict=True))
    return [p * (g - mean) for g, p in zip(grad_probs, probs, strict=True)]


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softplus(x: float) -> float:
    """Return ln(1 + exp(x))."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sqrtsoftplus(x: float) -> float:
    """Return the root of softplus."""
    # ln(1 + y) is y for y < 2^-53; taking the root of the power first keeps it from underflow.
    return math.exp(0.5 * x) if x < -40.0 else math.sqrt(softplus(x))


def sqrtsoftplus_slope(x: float) -> float:
    """Return the derivative of sqrtsoftplus, sigmoid(x) / (2 sqrtsoftplus(x)); 0 at -inf."""
    return 0.5 * math.exp(0.5 * x) if x < -40.0 else sigmoid(x) / (2.0 * sqrtsoftplus(x))


def score(row: list[float], name: str) -> list[float]:
    """Return the score of every logit of a row; only the softmax sums to 1."""
    if name == "softmax":
        return softmax(row)
    if name == "sigmoid":
        return [sigmoid(x) for x in row]
    return [sqrtsoftplus(x) for x in row]


def score_backward(grad: list[float], row: list[float], name: str) -> list[float]:
    """Return the gradient of the logits of a row, given that of their scores."""
    if name == "softmax":
        return softmax_backward(grad, softmax(row))
    if name == "sigmoid":
        # 1 - s loses everything where s is nearly 1; sigmoid(-x) does not.
        return [g * sigmoid(x) * sigmoid(-x) for g, x in zip(grad, row, strict=True)]
    return [g * sqrtsoftplus_slope(x) for g, x in zip(grad, row, strict=True)]


def is_finite_row(row: HostArray) -> bool:
    """Return whether the largest logit is neither NaN nor infinite; a single -inf is legal."""
    return not any(math.isnan(x) for x in row) and math.isfinite(max(row))
