"""Importance and load: squared coefficients of variation over experts."""

from __future__ import annotations

import math
from typing import get_args

from npmoe._checks import require
from npmoe._typing import Array, array_namespace
from npmoe.losses.conventions import Variance, check_choice, check_coefficient
from npmoe.losses.probabilities import (
    check_routing,
    normalized_probs,
    normalized_probs_backward,
    num_valid_tokens,
    usable_logits,
)
from npmoe.routing import Routing, stable_topk
from npmoe.special import erf


def importance_loss(
    routing: Routing, *, variance: Variance = "population", coefficient: float = 1.0
) -> tuple[float, Array]:
    """Return ``coefficient * Var(I) / mean(I)**2`` over experts, and its gradient.

    ``I_e = sum over t of p_te``, p being the scores divided by their sum per token, without the
    router noise.

    Parameters
    ----------
    routing : Routing
    variance : {"population", "bessel"}
        Divide the sum of squares by E (V-MoE) or by E-1 (Tutel).
    coefficient : float

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array

    Raises
    ------
    RangeError
        For an unknown variance, "bessel" with E = 1, or a coefficient that is not finite.
    ShapeError
        For soft routing.

    References
    ----------
    Shazeer et al. 2017, eq. 6-7; google-research/vmoe: _importance_auxiliary_loss;
    microsoft/tutel: load_importance_loss.
    """
    _check("importance_loss", routing, variance, coefficient)
    probs = normalized_probs(routing, clean=True)
    xp = array_namespace(probs)
    if num_valid_tokens(routing) == 0:
        return 0.0, xp.zeros_like(probs)
    value, slope = _squared_variation(probs.sum(axis=0, dtype=xp.float64), variance, coefficient)
    slope = slope.astype(probs.dtype)[None]
    return value, normalized_probs_backward(slope, probs, routing, clean=True)


def load_loss(
    routing: Routing,
    *,
    noise_std: float,
    variance: Variance = "population",
    coefficient: float = 1.0,
) -> tuple[float, Array]:
    """Return ``coefficient * Var(L) / mean(L)**2`` over experts, and its gradient.

    ``L_e = mean over t of 1 - Phi((threshold_t - clean_te) / noise_std)``, the chance that fresh
    noise would choose expert e; the threshold is the K-th largest noisy logit of the token.

    Parameters
    ----------
    routing : Routing
        Of a call with router noise: `clean_logits` beside `router_logits`; K = topk_ids.shape[1].
    noise_std : float
        Of the noise that was added (in V-MoE, its noise_std / E).
    variance : {"population", "bessel"}
        Divide the sum of squares by E (V-MoE) or by E-1 (Tutel).
    coefficient : float

    Returns
    -------
    value : float
    grad_router_logits : (T, E) float array
        Through the clean logits and through the threshold, the noise being constant.

    Raises
    ------
    RangeError
        Without noise, for an unknown variance, "bessel" with E = 1, or numbers out of range.
    ShapeError
        For soft routing.

    References
    ----------
    Shazeer et al. 2017, eq. 8-11; google-research/vmoe: _load_auxiliary_loss.
    """
    require(
        math.isfinite(noise_std) and noise_std > 0,
        f"load_loss: noise_std must be finite and > 0, got {noise_std}.",
    )
    _check("load_loss", routing, variance, coefficient)
    require(
        routing.clean_logits is not None,
        "load_loss: routing.clean_logits must be the logits before noise, got None. "
        "Route with router_noise_std > 0 and an rng; without noise there is no such loss.",
    )
    noisy, usable = usable_logits(routing, routing.router_logits)
    clean, also_usable = usable_logits(routing, routing.clean_logits)
    usable = usable & also_usable
    xp = array_namespace(noisy)
    num_valid = num_valid_tokens(routing)
    if num_valid == 0:
        return 0.0, xp.zeros_like(noisy)
    last = stable_topk(noisy, routing.topk_ids.shape[1])[:, -1:]
    threshold = xp.take_along_axis(noisy, last, axis=1)  # (T, 1)
    # An expert at -inf is never chosen, also where fewer than K others are left.
    never = ~xp.isfinite(clean) | ~usable[:, None]
    distance = (threshold - xp.where(never, xp.zeros_like(clean), clean)) / noise_std
    chance = 0.5 * (1.0 - erf(distance / math.sqrt(2.0)))
    chance = xp.where(never, xp.zeros_like(chance), chance)
    load = chance.sum(axis=0, dtype=xp.float64) / num_valid
    value, slope = _squared_variation(load, variance, coefficient)
    # The density underflows to 0 long before 50 deviations.
    finite = xp.where(never, xp.full_like(distance, 50.0), xp.clip(distance, -50.0, 50.0))
    density = xp.exp(-0.5 * finite * finite) / (noise_std * math.sqrt(2.0 * math.pi))
    grad = density * (slope / num_valid).astype(density.dtype)
    through_threshold = grad.sum(axis=1, keepdims=True)
    rows = xp.arange(grad.shape[0])
    grad[rows, last[:, 0]] -= through_threshold[:, 0]
    return value, grad


def _check(function: str, routing: Routing, variance: str, coefficient: float) -> None:
    """Raise for what both losses refuse."""
    check_routing(function, routing)
    check_choice(function, "variance", variance, get_args(Variance))
    check_coefficient(function, coefficient)
    num_experts = routing.probs.shape[1]
    require(
        variance == "population" or num_experts > 1,
        f"{function}: variance must be 'population' with E = 1, got {variance!r}. "
        "E is bound by routing.probs.",
    )


def _squared_variation(
    amounts: Array, variance: Variance, coefficient: float
) -> tuple[float, Array]:
    """Return coefficient * Var / mean**2 of (E,) amounts, and its gradient; 0 where the mean is."""
    xp = array_namespace(amounts)
    num_experts = amounts.shape[0]
    divisor = num_experts if variance == "population" else num_experts - 1
    mean = float(amounts.sum()) / num_experts
    if mean == 0.0:
        return 0.0, xp.zeros_like(amounts)
    relative = amounts / mean - 1.0
    value = float((relative * relative).sum()) / divisor
    # d Var/mean^2 = 2 (a - mean)/(divisor mean^2) - 2 Var/(E mean^3)
    grad = (2.0 / mean) * (relative / divisor - value / num_experts)
    return coefficient * value, coefficient * grad
