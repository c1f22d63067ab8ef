"""The activations of the experts: five curves v with limits, some infinite.

    act = min(v(min(g, before)), after) * (clip(u, -clip, clip) + shift), or v(g) alone.

The formulas are those of `npmoe.activations`; the twin is `accel/kernels/curves.cuh`. A curve is
the tuple (kind, alpha, before, after, clip, shift). All numbers are REAL: a Python literal would
be float64, and so would everything it meets.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

from ..curve import GELU, GELU_TANH, RELU, SILU
from .words import inline


class Curves(NamedTuple):
    """What a kernel calls; the last two take the gradient of the activation as well."""

    activate: Any  # (curve, g) -> act
    activate_gated: Any  # (curve, g, u) -> act
    activate_back: Any  # (curve, g, grad) -> act, grad_g
    activate_gated_back: Any  # (curve, g, u, grad) -> act, grad_g, grad_u


@lru_cache(maxsize=2)
def make_curves(REAL: Any) -> Curves:
    """Return the functions for numbers of a type."""
    near = 40.0  # beyond it a normal density is 0
    linear, cubic = 1.5957691216057307, 0.0713548162726009  # 2 sqrt(2/pi), and 0.044715 of it

    @inline
    def clipped(x, low, high):  # NaN stays NaN
        x = low if x < low else x
        return high if x > high else x

    @inline
    def evaluate(curve, g):  # the value of v at g, and its slope
        kind, alpha, before = curve[0], curve[1], curve[2]
        one, half = REAL(1), REAL(0.5)
        if kind == SILU:
            z = before if g > before else g
            below = one + math.exp(-alpha * z)
            s = one / below
            value = z / below
            # In this order nothing cancels where s rounds to 1.
            slope = REAL(0) if g > before else s + (one - s) * value * alpha
        elif kind == GELU:
            share = half * (one + math.erf(g * REAL(math.sqrt(0.5))))
            z = clipped(g, REAL(-near), REAL(near))
            value = share * g
            slope = share + z * REAL(1 / math.sqrt(2 * math.pi)) * math.exp(-half * (z * z))
        elif kind == GELU_TANH:
            z = clipped(g, REAL(-near), REAL(near))
            below = one + math.exp(-z * (z * z * REAL(cubic) + REAL(linear)))
            s = one / below
            value = g / below
            slope = s + (one - s) * value * (REAL(3 * cubic) * (z * z) + REAL(linear))
        else:
            z = REAL(0) if g <= REAL(0) else g
            value = z if kind == RELU else z * z
            slope = (one if g > REAL(0) else REAL(0)) if kind == RELU else z + z
        return value, slope

    @inline
    def activate(curve, g):
        return evaluate(curve, g)[0]

    @inline
    def activate_gated(curve, g, u):
        after, clip, shift = curve[3], curve[4], curve[5]
        value = evaluate(curve, g)[0]
        value = after if value > after else value
        return value * (clipped(u, -clip, clip) + shift)

    @inline
    def activate_back(curve, g, grad):
        value, slope = evaluate(curve, g)
        return value, grad * slope

    @inline
    def activate_gated_back(curve, g, u, grad):
        after, clip, shift = curve[3], curve[4], curve[5]
        value, slope = evaluate(curve, g)
        if value > after:
            value, slope = after, REAL(0)
        factor = clipped(u, -clip, clip) + shift
        inside = REAL(1) if u <= clip and u >= -clip else REAL(0)
        return value * factor, grad * (slope * factor), grad * value * inside

    return Curves(activate, activate_gated, activate_back, activate_gated_back)
