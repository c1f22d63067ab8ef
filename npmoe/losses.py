"""Auxiliary losses of a router: pure functions that return (value, grad_router_logits).

Nothing is remembered between calls. Pass the sum of the gradients to `moe_backward` as
`grad_router_logits`. Counts are constants: no gradient flows through a choice. Masked tokens
neither count nor receive gradient.
"""

from __future__ import annotations

from typing import Literal

from npmoe._typing import Array, array_namespace
from npmoe.errors import RangeError
from npmoe.routing import Routing


def load_balancing_loss(
    routing: Routing, *, convention: Literal["switch"] = "switch", coefficient: float = 1.0
) -> tuple[float, Array]:
    """Return the load-balancing loss and its gradient.

    "switch": ``coefficient * E * sum over e of f_e * P_e`` with f_e the fraction of choices that
    went to expert e (every choice counted, divided by T*K) and P_e its mean probability. It is
    `coefficient` under uniform routing.

    Parameters
    ----------
    routing : Routing
        Choices before any drop.
    convention : {"switch"}
        Which of the definitions in circulation.
    coefficient : float
        Factor of value and gradient.

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array

    Raises
    ------
    RangeError
        For an unknown convention.

    References
    ----------
    Fedus et al. 2021, "Switch Transformers", eq. 4-6.
    """
    if convention != "switch":
        raise RangeError(f"load_balancing_loss: convention must be 'switch', got {convention!r}.")
    probs = routing.probs
    xp = array_namespace(probs)
    num_experts, top_k = probs.shape[1], routing.topk_ids.shape[1]
    num_valid = _num_valid(routing)
    if num_valid == 0:
        return 0.0, xp.zeros_like(probs)
    ids = routing.topk_ids.reshape(-1)
    counts = xp.bincount(ids + 1, minlength=num_experts + 1)[1:]
    factor = coefficient * num_experts / (num_valid * num_valid * top_k)
    slope = (counts * factor).astype(probs.dtype)  # d loss / d p_te, the same for every token
    value = float((probs.sum(axis=0, dtype=xp.float64) * counts).sum()) * factor
    inner = (probs * slope).sum(axis=1, keepdims=True)
    return value, probs * (slope - inner)


def z_loss(routing: Routing, *, coefficient: float = 1.0) -> tuple[float, Array]:
    """Return ``coefficient * mean of logsumexp(x)**2`` over valid tokens, and its gradient.

    Parameters
    ----------
    routing : Routing
    coefficient : float

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array
        ``2 * coefficient * logsumexp(x) * softmax(x) / T_valid``.

    References
    ----------
    Zoph et al. 2022, "ST-MoE", eq. 5.
    """
    probs = routing.probs
    xp = array_namespace(probs)
    num_valid = _num_valid(routing)
    if num_valid == 0:
        return 0.0, xp.zeros_like(probs)
    log_sum_exp = _log_sum_exp(routing)
    value = coefficient * float((log_sum_exp.astype(xp.float64) ** 2).sum()) / num_valid
    return value, probs * (log_sum_exp * (2.0 * coefficient / num_valid))[:, None]


def entropy_loss(routing: Routing, *, coefficient: float = 1.0) -> tuple[float, Array]:
    """Return ``coefficient * mean entropy of the rows of probs`` (nats), and its gradient.

    A negative coefficient rewards spread-out routing. 0 * log 0 = 0.

    Parameters
    ----------
    routing : Routing
    coefficient : float

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array
        ``-coefficient * p * (log p + entropy) / T_valid``.
    """
    probs = routing.probs
    xp = array_namespace(probs)
    num_valid = _num_valid(routing)
    if num_valid == 0:
        return 0.0, xp.zeros_like(probs)
    log_probs = xp.log(xp.where(probs > 0, probs, xp.ones_like(probs)))
    entropy = -(probs * log_probs).sum(axis=1)
    value = coefficient * float(entropy.sum(dtype=xp.float64)) / num_valid
    grad = probs * (log_probs + entropy[:, None])
    return value, grad * (-coefficient / num_valid)


def _num_valid(routing: Routing) -> int:
    """Return how many tokens count."""
    mask = routing.token_mask
    return int(routing.probs.shape[0]) if mask is None else int(mask.sum())


def _log_sum_exp(routing: Routing) -> Array:
    """Return log(sum(exp(x))) of every row (T,); 0 in rows that do not count."""
    logits = routing.router_logits
    xp = array_namespace(logits)
    largest = logits.max(axis=1)
    counts = xp.isfinite(largest)
    if routing.token_mask is not None:
        counts = counts & routing.token_mask
    safe = xp.where(counts[:, None], logits, xp.zeros_like(logits))
    top = safe.max(axis=1)
    value = top + xp.log(xp.exp(safe - top[:, None]).sum(axis=1))
    return xp.where(counts, value, xp.zeros_like(value))
