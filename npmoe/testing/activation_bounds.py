"""Activations of balls. The constants are the largest slopes, found where the next one is 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from npmoe._typing import HostArray
from npmoe.naive.activations import gelu, gelu_slope, sigmoid, silu_slope
from npmoe.testing.balls import Ball

SILU_SLOPE = 1.0999  # silu' at 2.3994
SILU_CURVE = 0.5  # silu'' at 0
GELU_SLOPE = 1.1290  # gelu' at sqrt(2)
GELU_CURVE = math.sqrt(2.0 / math.pi)  # gelu'' at 0


def activation(z: Ball, name: str) -> Ball:
    """Return the ball of the activation: (R, 2I) or (R, I) -> (R, I)."""
    if name == "swiglu":
        g, u = _halves(z)
        return _silu(g) * u
    if name == "gelu":
        # 1 + erf rounds by u, times |z|.
        return z.apply(_each(gelu), GELU_SLOPE, lambda size: size)
    return Ball(np.maximum(z.mid, 0.0), z.rad, z.model)


def activation_backward(grad_act: Ball, z: Ball, name: str) -> Ball:
    """Return the ball of the gradient of z."""
    if name == "swiglu":
        g, u = _halves(z)
        # sigmoid rounds by u, and its derivative multiplies that by |z|.
        slope = g.apply(_each(silu_slope), SILU_CURVE, lambda size: 1.0 + size)
        grad_g, grad_u = grad_act * u * slope, grad_act * _silu(g)
        return Ball(
            np.concatenate([grad_g.mid, grad_u.mid], axis=1),
            np.concatenate([grad_g.rad, grad_u.rad], axis=1),
            z.model,
        )
    if name == "gelu":
        return grad_act * z.apply(_each(gelu_slope), GELU_CURVE, np.ones_like)
    # Where z may lie on either side of the kink, so may the slope.
    unsure = (np.abs(z.mid) <= z.rad) & (z.rad > 0.0)
    slope = Ball((z.mid > 0).astype(float), unsure.astype(float), z.model)
    return grad_act * slope


def _silu(g: Ball) -> Ball:
    return g.apply(lambda mid: mid * _each(sigmoid)(mid), SILU_SLOPE, lambda size: size)


def _each(function: Callable[[float], float]) -> Callable[[HostArray], HostArray]:
    """Return `function` applied to every element of an array."""
    return lambda values: np.array([function(v) for v in values.flat]).reshape(values.shape)


def _halves(z: Ball) -> tuple[Ball, Ball]:
    half = z.mid.shape[1] // 2
    return z[:, :half], z[:, half:]
