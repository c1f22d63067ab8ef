"""Activations of balls. The constants are the largest slopes, found where the next one is 0."""

from __future__ import annotations

import math

import numpy as np

from npmoe.activations import ACTIVATIONS
from npmoe.naive import activations as naive
from npmoe.testing.balls import Ball, each

SILU_SLOPE = 1.0999  # silu' at 2.3994
SILU_CURVE = 0.5  # silu'' at 0
GELU_SLOPE = 1.1290  # gelu' at sqrt(2)
GELU_CURVE = math.sqrt(2.0 / math.pi)  # gelu'' at 0
GELU_TANH_SLOPE = 1.1290  # gelu_tanh' at 1.4185
GELU_TANH_CURVE = math.sqrt(2.0 / math.pi)  # gelu_tanh'' at 0


def activation(z: Ball, name: str, alpha: float | None = None, limit: float | None = None) -> Ball:
    """Return the ball of the activation: (R, 2I) or (R, I) -> (R, I)."""
    if not ACTIVATIONS[name].gated:
        return _value(z, name)
    value, _, factor, _ = _gated(z, name, alpha, limit)
    return value * factor


def activation_backward(
    grad_act: Ball, z: Ball, name: str, alpha: float | None = None, limit: float | None = None
) -> Ball:
    """Return the ball of the gradient of z."""
    if not ACTIVATIONS[name].gated:
        return grad_act * _slope(z, name)
    value, slope, factor, factor_slope = _gated(z, name, alpha, limit)
    # da * w keeps the size of either factor in the radius, whatever the order of the products.
    grad_g, grad_u = grad_act * factor * slope, grad_act * value * factor_slope
    return Ball(
        np.concatenate([grad_g.mid, grad_u.mid], axis=1),
        np.concatenate([grad_g.rad, grad_u.rad], axis=1),
        z.model,
    )


def _gated(
    z: Ball, name: str, alpha: float | None, limit: float | None
) -> tuple[Ball, Ball, Ball, Ball]:
    """Return the gate half's value and slope, and the up half's factor and its slope."""
    g, u = _halves(z)
    one = Ball.exact(np.ones(u.mid.shape), z.model)
    family, curve = ACTIVATIONS[name], naive.GATED[name]
    if family.default_limit is None:
        return _value(g, curve), _slope(g, curve), u, one
    bound = family.default_limit if limit is None else limit
    factor, inside_u = _clip(u, -bound, bound), _where_below(one, _abs(u), bound)
    if name == "swiglu_clamp_post":
        value = _value(g, curve)
        slope = _where_below(_slope(g, curve), value, bound)
        return _clip(value, -math.inf, bound), slope, factor, inside_u
    if name == "swiglu_oai":
        factor = factor + one
    clipped = _clip(g, -math.inf, bound)
    a = (family.default_alpha or 1.0) if alpha is None else alpha
    slope = _where_below(_slope(clipped, curve, a), g, bound)
    return _value(clipped, curve, a), slope, factor, inside_u


def _value(z: Ball, name: str, alpha: float = 1.0) -> Ball:
    """Return the ball of a plain activation."""
    if name == "silu":
        return _silu(z, alpha)
    if name == "gelu":
        # 1 + erf rounds by u, times |z|.
        return z.apply(each(naive.gelu), GELU_SLOPE, lambda size: size)
    if name == "gelu_tanh":
        return z.apply(each(naive.gelu_tanh), GELU_TANH_SLOPE, lambda size: size)
    positive = Ball(np.maximum(z.mid, 0.0), z.rad, z.model)
    return positive * positive if name == "relu2" else positive


def _slope(z: Ball, name: str, alpha: float = 1.0) -> Ball:
    """Return the ball of the derivative of a plain activation."""
    if name == "silu":
        # sigmoid rounds by u, and its derivative multiplies that by |alpha z|.
        function = each(lambda v: naive.silu_slope(v, alpha))
        return z.apply(function, SILU_CURVE * alpha, lambda size: 1.0 + alpha * size)
    if name == "gelu":
        return z.apply(each(naive.gelu_slope), GELU_CURVE, np.ones_like)
    if name == "gelu_tanh":
        # 1 - tanh^2 rounds by u, times z and the derivative inside: below 100 while it is not 0.
        function = each(naive.gelu_tanh_slope)
        return z.apply(function, GELU_TANH_CURVE, lambda size: np.full_like(size, 8.0))
    if name == "relu2":
        return Ball(2.0 * np.maximum(z.mid, 0.0), 2.0 * z.rad, z.model)
    one = Ball.exact(np.ones(z.mid.shape), z.model)
    # The slope at the kink is that of the left.
    return _where_below(one, Ball(-z.mid, z.rad, z.model), 0.0, inclusive=False)


def _silu(g: Ball, alpha: float = 1.0) -> Ball:
    return g.apply(each(lambda v: naive.silu(v, alpha)), SILU_SLOPE, lambda size: size)


def _clip(z: Ball, low: float, high: float) -> Ball:
    """Clip; a limit may have been rounded to the program's dtype."""
    cut = (z.mid - z.rad < low) | (z.mid + z.rad > high)
    return Ball(np.clip(z.mid, low, high), z.rad + np.where(cut, z.model.u * high, 0.0), z.model)


def _where_below(value: Ball, z: Ball, bound: float, *, inclusive: bool = True) -> Ball:
    """Return `value` where z is at most `bound`, else 0; where z may be on either side, both."""
    inside = z.mid <= bound if inclusive else z.mid < bound
    distance = np.abs(z.mid - bound)
    unsure = (distance <= z.rad + z.model.u * bound) & ((z.rad > 0.0) | (distance > 0.0))
    rad = np.where(unsure, value.size, np.where(inside, value.rad, 0.0))
    return Ball(np.where(inside, value.mid, 0.0), rad, value.model)


def _abs(z: Ball) -> Ball:
    return Ball(np.abs(z.mid), z.rad, z.model)


def _halves(z: Ball) -> tuple[Ball, Ball]:
    half = z.mid.shape[1] // 2
    return z[:, :half], z[:, half:]
