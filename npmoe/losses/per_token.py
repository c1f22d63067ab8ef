"""Losses that are a mean over tokens."""

from __future__ import annotations

from npmoe._typing import Array, array_namespace
from npmoe.losses.conventions import check_coefficient
from npmoe.losses.probabilities import (
    check_routing,
    normalized_probs,
    normalized_probs_backward,
    num_valid_tokens,
    usable_logits,
)
from npmoe.routing import Routing


def z_loss(routing: Routing, *, coefficient: float = 1.0) -> tuple[float, Array]:
    """Return ``coefficient * mean of logsumexp(x)**2`` over valid tokens, and its gradient.

    Parameters
    ----------
    routing : Routing
        Its logits, whatever the score function.
    coefficient : float

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array
        ``2 * coefficient * logsumexp(x) * softmax(x) / T_valid``.

    Raises
    ------
    RangeError
        If the coefficient is not finite.
    ShapeError
        For soft routing.

    References
    ----------
    Zoph et al. 2022, "ST-MoE", eq. 5.
    """
    check_coefficient("z_loss", coefficient)
    check_routing("z_loss", routing)
    xp = array_namespace(routing.probs)
    num_valid = num_valid_tokens(routing)
    if num_valid == 0:
        return 0.0, xp.zeros_like(routing.probs)
    logits, usable = usable_logits(routing, routing.router_logits)
    top = logits.max(axis=1)
    log_sum_exp = top + xp.log(xp.exp(logits - top[:, None]).sum(axis=1))
    log_sum_exp = xp.where(usable, log_sum_exp, xp.zeros_like(log_sum_exp))
    value = coefficient * float((log_sum_exp.astype(xp.float64) ** 2).sum()) / num_valid
    probs = normalized_probs(routing, softmax=True)
    return value, probs * (log_sum_exp * (2.0 * coefficient / num_valid))[:, None]


def entropy_loss(routing: Routing, *, coefficient: float = 1.0) -> tuple[float, Array]:
    """Return ``coefficient * mean entropy of the rows of p`` (nats), and its gradient.

    p are the scores divided by their sum per token. A negative coefficient rewards spread-out
    routing. 0 * log 0 = 0.

    Parameters
    ----------
    routing : Routing
    coefficient : float

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array
        ``-coefficient * p * (log p + entropy) / T_valid`` for a softmax.

    Raises
    ------
    RangeError
        If the coefficient is not finite.
    ShapeError
        For soft routing.
    """
    check_coefficient("entropy_loss", coefficient)
    check_routing("entropy_loss", routing)
    probs = normalized_probs(routing)
    xp = array_namespace(probs)
    num_valid = num_valid_tokens(routing)
    if num_valid == 0:
        return 0.0, xp.zeros_like(probs)
    log_probs = xp.log(xp.where(probs > 0, probs, xp.ones_like(probs)))
    entropy = -(probs * log_probs).sum(axis=1)
    value = coefficient * float(entropy.sum(dtype=xp.float64)) / num_valid
    grad_probs = log_probs * (-coefficient / num_valid)
    return value, normalized_probs_backward(grad_probs, probs, routing)
