"""Expert activations by name, gated and plain, with their derivatives.

Each rests on a curve v of one number. A plain activation is v(x), a gated one v(g) * w(u) of the
gate half g and the up half u, and its gradients are::

    dx = da v'(x)        dg = da v'(g) w(u)        du = da v(g) w'(u)

w(u) is u, or clip(u, -L, L) in those with a limit L, plus 1 in "swiglu_oai". Their curves are
limited too: from above only, and before or after SiLU. At a limit the slope is the inside one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.errors import RangeError
from npmoe.special import erf


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """One activation, its parameters bound: its function and its derivative.

    `forward(pre)` maps (R, 2I) to (R, I) if `gated`, gate in the first half, else (R, I) to
    (R, I). `recompute_and_backward(grad_act, pre)` returns that again and the gradient of `pre`,
    sharing what both need. `kink_sides` is the function of that name. All results are new arrays.
    """

    forward: Callable[[Array], Array]
    recompute_and_backward: Callable[[Array, Array], tuple[Array, Array]]
    gated: bool
    kink_sides: Callable[[Array], Array]

    def backward(self, grad_act: Array, pre: Array) -> Array:
        """Return the gradient of `pre`."""
        return self.recompute_and_backward(grad_act, pre)[1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationFamily:
    """One entry of ACTIVATIONS: whether it has a gate half, and its parameters.

    The defaults are published values, None where the activation has no such parameter. `make`
    takes alpha and limit; use `bind_activation`, which checks them.
    """

    gated: bool
    make: Callable[[float, float], Activation]
    default_alpha: float | None = None
    default_limit: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Curve:
    """A function of one number: its value, value and slope together, and the side of its kink.

    All return new arrays; `side` is None for a smooth curve.
    """

    value: Callable[[Array], Array]
    value_and_slope: Callable[[Array], tuple[Array, Array]]
    side: Callable[[Array], Array] | None = None


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), without overflow for any x.

    **Accuracy**: relative, a few units in the last place, down to where 1/s overflows (x < -88 in
    float32, -709 in float64); 0 below.
    """
    xp = array_namespace(x)
    y = _one_plus_exp(x, -1.0)
    xp.divide(1.0, y, out=y)
    return y


def _one_plus_exp(x: Array, factor: Array | float) -> Array:
    """Return 1 + exp(x * factor); infinity is meant, its reciprocal being 0."""
    with np.errstate(over="ignore"):
        y = x * factor
        array_namespace(x).exp(y, out=y)
    y += 1.0
    return y


def _silu(alpha: float = 1.0) -> _Curve:
    """X * s and s + alpha*x*s*(1 - s), with s = sigmoid(alpha * x)."""

    def value(x: Array) -> Array:
        y = _one_plus_exp(x, -alpha)
        array_namespace(x).divide(x, y, out=y)
        return y

    def value_and_slope(x: Array) -> tuple[Array, Array]:
        xp = array_namespace(x)
        s = _one_plus_exp(x, -alpha)
        value = x / s
        xp.divide(1.0, s, out=s)
        # s + alpha*value*(1 - s), in this order: where s rounds to 1 nothing cancels.
        slope = 1.0 - s
        slope *= value
        if alpha != 1.0:
            slope *= alpha
        slope += s
        return value, slope

    return _Curve(value, value_and_slope)


# tanh-GELU is x * sigmoid(2c (x + k x^3)), since (1 + tanh z) / 2 = sigmoid(2z).
_TWO_C = 2.0 * math.sqrt(2.0 / math.pi)
_K = 0.044715


def _near(x: Array) -> Array:
    """Clip to where a normal density is not 0 yet, so that no power overflows."""
    return array_namespace(x).clip(x, -40.0, 40.0)


def _gelu_tanh() -> _Curve:
    """X * s and s + x*s*(1 - s)*z', with s = sigmoid(z), z = 2c(x + k x^3), c = sqrt(2/pi)."""

    def value(x: Array) -> Array:
        near = _near(x)
        y = _one_plus_exp(near, near * near * (-_TWO_C * _K) - _TWO_C)
        array_namespace(x).divide(x, y, out=y)
        return y

    def value_and_slope(x: Array) -> tuple[Array, Array]:
        xp = array_namespace(x)
        near = _near(x)
        square = near * near
        s = _one_plus_exp(near, square * (-_TWO_C * _K) - _TWO_C)
        value = x / s
        xp.divide(1.0, s, out=s)
        slope = 1.0 - s
        slope *= value
        square *= 3.0 * _TWO_C * _K
        square += _TWO_C
        slope *= square
        slope += s
        return value, slope

    return _Curve(value, value_and_slope)


def _gelu() -> _Curve:
    """X * Phi(x) and Phi(x) + x * phi(x), Phi the normal distribution function, by erf."""

    def distribution(x: Array) -> Array:
        y = erf(x * math.sqrt(0.5))
        y += 1.0
        y *= 0.5
        return y

    def value(x: Array) -> Array:
        y = distribution(x)
        y *= x
        return y

    def value_and_slope(x: Array) -> tuple[Array, Array]:
        slope = distribution(x)
        value = slope * x
        near = _near(x)
        density = array_namespace(x).exp(near * near * -0.5)
        density *= near * (1.0 / math.sqrt(2.0 * math.pi))
        slope += density
        return value, slope

    return _Curve(value, value_and_slope)


def _relu(power: int = 1) -> _Curve:
    """max(x, 0) or its square; the slope at 0 is 0."""

    def value(x: Array) -> Array:
        y = array_namespace(x).maximum(x, 0.0)
        if power == 2:
            y *= y
        return y

    def value_and_slope(x: Array) -> tuple[Array, Array]:
        y = array_namespace(x).maximum(x, 0.0)
        if power == 2:
            return y * y, y * 2.0
        return y, (x > 0.0).astype(x.dtype)

    return _Curve(value, value_and_slope, side=lambda x: x > 0.0)


def _limited_before(curve: _Curve, limit: float) -> _Curve:
    """curve(min(x, limit)) of a smooth curve."""

    def value_and_slope(x: Array) -> tuple[Array, Array]:
        value, slope = curve.value_and_slope(array_namespace(x).minimum(x, limit))
        slope *= x <= limit
        return value, slope

    return _Curve(
        lambda x: curve.value(array_namespace(x).minimum(x, limit)),
        value_and_slope,
        side=lambda x: x <= limit,
    )


def _limited_after(curve: _Curve, limit: float) -> _Curve:
    """min(curve(x), limit) of a smooth curve."""

    def value(x: Array) -> Array:
        y = curve.value(x)
        array_namespace(x).minimum(y, limit, out=y)
        return y

    def value_and_slope(x: Array) -> tuple[Array, Array]:
        value, slope = curve.value_and_slope(x)
        slope *= value <= limit
        array_namespace(x).minimum(value, limit, out=value)
        return value, slope

    return _Curve(value, value_and_slope, side=lambda x: curve.value(x) <= limit)


def _plain(curve: _Curve) -> Activation:
    """Return the activation v(x)."""

    def recompute_and_backward(grad_act: Array, pre: Array) -> tuple[Array, Array]:
        act, slope = curve.value_and_slope(pre)
        slope *= grad_act
        return act, slope

    def kink_sides(pre: Array) -> Array:
        return _no_kinks(pre) if curve.side is None else curve.side(pre)

    return Activation(curve.value, recompute_and_backward, gated=False, kink_sides=kink_sides)


def _gated(curve: _Curve, *, limit: float | None = None, shift: float = 0.0) -> Activation:
    """Return the activation v(g) * w(u), with w(u) = clip(u, -limit, limit) + shift."""

    def factor(u: Array) -> Array:
        if limit is None:
            return u
        w = array_namespace(u).clip(u, -limit, limit)
        if shift:
            w += shift
        return w

    def forward(pre: Array) -> Array:
        g, u = _halves(pre)
        act = curve.value(g)
        act *= factor(u)
        return act

    def recompute_and_backward(grad_act: Array, pre: Array) -> tuple[Array, Array]:
        xp = array_namespace(pre)
        g, u = _halves(pre)
        value, slope = curve.value_and_slope(g)
        w = factor(u)
        grad_pre = xp.empty_like(pre)
        grad_g, grad_u = _halves(grad_pre)
        xp.multiply(grad_act, value, out=grad_u)
        if limit is not None:
            grad_u *= xp.abs(u) <= limit
        slope *= w
        xp.multiply(grad_act, slope, out=grad_g)
        value *= w
        return value, grad_pre

    def kink_sides(pre: Array) -> Array:
        xp = array_namespace(pre)
        g, u = _halves(pre)
        sides = [] if curve.side is None else [curve.side(g)]
        if limit is not None:
            sides += [u >= -limit, u <= limit]
        return xp.concatenate(tuple(sides), axis=-1) if sides else _no_kinks(pre)

    return Activation(forward, recompute_and_backward, gated=True, kink_sides=kink_sides)


def _halves(pre: Array) -> tuple[Array, Array]:
    half = pre.shape[-1] // 2
    return pre[..., :half], pre[..., half:]


def _no_kinks(pre: Array) -> Array:
    return array_namespace(pre).zeros((*pre.shape[:-1], 0), bool)


ACTIVATIONS: dict[str, ActivationFamily] = {
    # Shazeer 2020, "GLU Variants Improve Transformer", eq. 5 and 6.
    "swiglu": ActivationFamily(gated=True, make=lambda *_: _gated(_silu())),
    # DeepSeek-V4; the limit is its swiglu_limit.
    "swiglu_clamp_pre": ActivationFamily(
        gated=True,
        default_limit=10.0,
        make=lambda _, limit: _gated(_limited_before(_silu(), limit), limit=limit),
    ),
    # Step-3.7-Flash: 7 for the routed experts of its last layers, 16 for their shared expert.
    "swiglu_clamp_post": ActivationFamily(
        gated=True,
        default_limit=7.0,
        make=lambda _, limit: _gated(_limited_after(_silu(), limit), limit=limit),
    ),
    # gpt-oss.
    "swiglu_oai": ActivationFamily(
        gated=True,
        default_alpha=1.702,
        default_limit=7.0,
        make=lambda alpha, limit: _gated(
            _limited_before(_silu(alpha), limit), limit=limit, shift=1.0
        ),
    ),
    "geglu": ActivationFamily(gated=True, make=lambda *_: _gated(_gelu())),
    "geglu_tanh": ActivationFamily(gated=True, make=lambda *_: _gated(_gelu_tanh())),
    "reglu": ActivationFamily(gated=True, make=lambda *_: _gated(_relu())),
    "silu": ActivationFamily(gated=False, make=lambda *_: _plain(_silu())),
    "gelu": ActivationFamily(gated=False, make=lambda *_: _plain(_gelu())),
    "gelu_tanh": ActivationFamily(gated=False, make=lambda *_: _plain(_gelu_tanh())),
    "relu": ActivationFamily(gated=False, make=lambda *_: _plain(_relu())),
    # So et al. 2021, "Primer".
    "relu2": ActivationFamily(gated=False, make=lambda *_: _plain(_relu(2))),
}


def bind_activation(
    name: str, alpha: float | None = None, limit: float | None = None
) -> Activation:
    """Return an activation with its parameters fixed.

    Parameters
    ----------
    name : str
        A key of ACTIVATIONS.
    alpha, limit : float, optional
        Finite and above 0, for activations that have them; None is the published value.

    Returns
    -------
    Activation
        The same object for the same values.

    Raises
    ------
    RangeError
        If the name is unknown, or a parameter is out of range or not one of this activation.
    """
    if name not in ACTIVATIONS:
        raise RangeError(
            f"bind_activation: name must be one of {', '.join(map(repr, ACTIVATIONS))}, "
            f"got {name!r}."
        )
    family = ACTIVATIONS[name]
    return _bind(
        name,
        _parameter(name, "alpha", alpha, family.default_alpha),
        _parameter(name, "limit", limit, family.default_limit),
    )


def _parameter(name: str, what: str, value: float | None, default: float | None) -> float:
    """Return a parameter, checked; 0 stands for one that the activation does not have."""
    if value is None:
        return 0.0 if default is None else default
    if default is None:
        having = [repr(n) for n, f in ACTIVATIONS.items() if getattr(f, f"default_{what}")]
        raise RangeError(
            f"bind_activation: {what} must be None for {name!r}, got {value!r}. "
            f"Activations with it: {', '.join(having)}."
        )
    if isinstance(value, bool) or not 0.0 < value < math.inf:
        raise RangeError(
            f"bind_activation: {what} must be finite and above 0, got {value!r}. "
            f"None is the published {default}."
        )
    return float(value)


@functools.cache
def _bind(name: str, alpha: float, limit: float) -> Activation:
    return ACTIVATIONS[name].make(alpha, limit)


def kink_sides(
    pre: Array, name: str, alpha: float | None = None, limit: float | None = None
) -> Array:
    """Return on which side of each kink every entry lies.

    The activation is smooth where this is constant, so it serves `gradcheck` as decisions. For
    "relu2", whose first derivative has the kink, too.

    Parameters
    ----------
    pre : (..., 2I) float array
        Pre-activation; (..., I) for a plain activation.
    name, alpha, limit
        As for `bind_activation`.

    Returns
    -------
    (..., N*I) bool array
        New; N kinks: 0 for smooth activations, 1 for the ReLUs, 3 for those with a limit.

    Raises
    ------
    RangeError
        As `bind_activation`.
    """
    return bind_activation(name, alpha, limit).kink_sides(pre)
