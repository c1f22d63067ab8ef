"""Expert activations by name, gated and plain, with their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from npmoe._typing import Array, array_namespace
from npmoe.special import erf


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """One activation: its function, its derivative and whether it has a gate half.

    `forward(pre)` maps (R, 2I) to (R, I) if `gated`, gate in the first half, else (R, I) to
    (R, I). `recompute_and_backward(grad_act, pre)` returns that again and the gradient of `pre`,
    sharing what both need. All results are new arrays.
    """

    forward: Callable[[Array], Array]
    recompute_and_backward: Callable[[Array, Array], tuple[Array, Array]]
    gated: bool

    def backward(self, grad_act: Array, pre: Array) -> Array:
        """Return the gradient of `pre`."""
        return self.recompute_and_backward(grad_act, pre)[1]


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), without overflow for any x, as (1 + tanh(x/2)) / 2.

    **Accuracy**: absolute error of a few units in the last place of 1.
    """
    xp = array_namespace(x)
    y = x * 0.5
    xp.tanh(y, out=y)
    y += 1.0
    y *= 0.5
    return y


def swiglu(pre: Array) -> Array:
    """Return silu(g) * u for pre = (g | u): Shazeer 2020, "GLU Variants", eq. 5."""
    half = pre.shape[-1] // 2
    act = sigmoid(pre[..., :half])
    act *= pre[..., :half]
    act *= pre[..., half:]
    return act


def swiglu_backward(grad_act: Array, pre: Array) -> tuple[Array, Array]:
    """Return act and (dg | du): dg = da*u*s*(1 + g*(1 - s)), du = da*g*s, with s = sigmoid(g)."""
    xp = array_namespace(pre)
    half = pre.shape[-1] // 2
    g, u = pre[..., :half], pre[..., half:]
    s = sigmoid(g)
    silu = s * g
    act = silu * u
    grad_pre = xp.empty_like(pre)
    grad_g, grad_u = grad_pre[..., :half], grad_pre[..., half:]
    xp.multiply(grad_act, silu, out=grad_u)
    # s + silu*(1 - s), in this order: where s rounds to 1 nothing cancels.
    slope = 1.0 - s
    slope *= silu
    slope += s
    slope *= u
    xp.multiply(grad_act, slope, out=grad_g)
    return act, grad_pre


def gelu(pre: Array) -> Array:
    """Return x * Phi(x), Phi the normal distribution function (exact form, with erf)."""
    act = erf(pre * math.sqrt(0.5))
    act += 1.0
    act *= 0.5
    act *= pre
    return act


def gelu_backward(grad_act: Array, pre: Array) -> tuple[Array, Array]:
    """Return act and grad_act * (Phi(x) + x * phi(x))."""
    xp = array_namespace(pre)
    slope = erf(pre * math.sqrt(0.5))
    slope += 1.0
    slope *= 0.5
    act = slope * pre
    # Beyond 40 the density is 0 in either dtype; clipping keeps the square from overflowing.
    near = xp.clip(pre, -40.0, 40.0)
    density = xp.exp(near * near * -0.5)
    density *= near * (1.0 / math.sqrt(2.0 * math.pi))
    slope += density
    slope *= grad_act
    return act, slope


def relu(pre: Array) -> Array:
    """Return max(x, 0)."""
    return array_namespace(pre).maximum(pre, 0.0)


def relu_backward(grad_act: Array, pre: Array) -> tuple[Array, Array]:
    """Return act, and grad_act where x > 0, else 0; the derivative at 0 is 0."""
    return relu(pre), array_namespace(pre).where(pre > 0, grad_act, 0.0)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(swiglu, swiglu_backward, gated=True),
    "gelu": Activation(gelu, gelu_backward, gated=False),
    "relu": Activation(relu, relu_backward, gated=False),
}
