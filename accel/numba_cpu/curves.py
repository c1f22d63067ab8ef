"""The activations of the experts (`accel/curve.py`), for whole stretches of numbers at once."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ..curve import GELU, GELU_TANH, RELU, SILU
from .compiling import inner
from .emit import I32, I64


@intrinsic
def _fma(context, a, b, c):
    """Return a * b + c, rounded once."""

    def generate(context, builder, signature, args):
        function = ir.FunctionType(args[0].type, [args[0].type] * 3)
        name = f"llvm.fma.f{a.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return a(a, a, a), generate


@intrinsic
def _times_power_of_two(context, y, n):
    """Return y * 2**n for a whole number n, in two factors: either end of the range needs both."""
    integer, bias, mantissa = (I64, 1023, 52) if y == types.float64 else (I32, 127, 23)

    def generate(context, builder, signature, args):
        result, exponent = args[0], builder.fptosi(args[1], integer)
        first = builder.ashr(exponent, integer(1))
        for part in (first, builder.sub(exponent, first)):
            bits = builder.shl(builder.add(part, integer(bias)), integer(mantissa))
            result = builder.fmul(result, builder.bitcast(bits, args[0].type))
        return result

    return y(y, n), generate


_LOG2_E = math.log2(math.e)
# ln 2 as a number with many trailing zeros and the rest, so that n * high is exact.
_HIGH_32, _LOW_32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_HIGH_64, _LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_F = tuple(np.float32(1.0 / math.factorial(n)) for n in range(8))
_D = tuple(1.0 / math.factorial(n) for n in range(14))


# x = n ln 2 + r with |r| <= ln(2)/2; exp(r) by its series, whose first missing term is below a
# tenth of an ulp.
@inner
def _exp_single(x):
    low, high = np.float32(-104.0), np.float32(89.0)
    z = low if x < low else x
    z = high if z > high else z
    n = np.rint(z * np.float32(_LOG2_E))
    r = _fma(n, -_LOW_32, _fma(n, -_HIGH_32, z))
    p = _fma(_F[7], r, _F[6])
    p = _fma(p, r, _F[5])
    p = _fma(p, r, _F[4])
    p = _fma(p, r, _F[3])
    p = _fma(p, r, _F[2])
    p = _fma(p, r, _F[1])
    p = _fma(p, r, _F[0])
    y = _times_power_of_two(p, n)
    return y if x == x else x  # noqa: PLR0124


@inner
def _exp_double(x):
    low, high = -746.0, 710.0
    z = low if x < low else x
    z = high if z > high else z
    n = np.rint(z * _LOG2_E)
    r = _fma(n, -_LOW_64, _fma(n, -_HIGH_64, z))
    p = _fma(_D[13], r, _D[12])
    p = _fma(p, r, _D[11])
    p = _fma(p, r, _D[10])
    p = _fma(p, r, _D[9])
    p = _fma(p, r, _D[8])
    p = _fma(p, r, _D[7])
    p = _fma(p, r, _D[6])
    p = _fma(p, r, _D[5])
    p = _fma(p, r, _D[4])
    p = _fma(p, r, _D[3])
    p = _fma(p, r, _D[2])
    p = _fma(p, r, _D[1])
    p = _fma(p, r, _D[0])
    y = _times_power_of_two(p, n)
    return y if x == x else x  # noqa: PLR0124


def _exponential(x):
    """Return exp(x), in a form that loops over arrays can be vectorised with."""
    return np.exp(x)


@overload(_exponential)
def _choose_exponential(x):
    chosen = _exp_single if x == types.float32 else _exp_double

    def call(x):
        return chosen(x)

    return call


_ROOT_HALF = math.sqrt(0.5)
_DENSITY = 1.0 / math.sqrt(2.0 * math.pi)
_TWO_C = 2.0 * math.sqrt(2.0 / math.pi)
_K = 0.044715
_NEAR = 40.0  # beyond it a normal density is 0, and powers would overflow


@inner
def _clip(x, low, high):
    """Clip a number; NaN stays NaN."""
    x = low if x < low else x
    return high if x > high else x


@inner
def activate(kind, gated, settings, g, u, out):
    """Write the activation of stretches of equal length; `u` is not read without a gate."""
    T = out.dtype.type
    one, half = T(1.0), T(0.5)
    alpha, before, after, clip, shift = settings
    if kind == SILU:
        for i in range(out.size):
            z = before if g[i] > before else g[i]
            out[i] = z / (one + _exponential(-alpha * z))
    elif kind == GELU:
        for i in range(out.size):
            out[i] = half * (one + math.erf(g[i] * T(_ROOT_HALF))) * g[i]
    elif kind == GELU_TANH:
        near, linear, cubic = T(_NEAR), T(-_TWO_C), T(-_TWO_C * _K)
        for i in range(out.size):
            z = _clip(g[i], -near, near)
            out[i] = g[i] / (one + _exponential(z * (z * z * cubic + linear)))
    else:
        for i in range(out.size):
            z = T(0.0) if g[i] <= T(0.0) else g[i]
            out[i] = z if kind == RELU else z * z
    if gated:
        for i in range(out.size):
            value = after if out[i] > after else out[i]
            out[i] = value * (_clip(u[i], -clip, clip) + shift)


@inner
def activate_backward(kind, gated, settings, factor, grad, g, u, act, grad_g, grad_u):
    """Write the activation again, and the gradients of both halves.

    ``factor * grad`` is the gradient of the activation; `grad` may not share memory with what is
    written. Each loop reads and writes so few arrays that it can be vectorised.
    """
    T = act.dtype.type
    one, half, zero = T(1.0), T(0.5), T(0.0)
    alpha, before, after, clip, shift = settings
    # Value and slope of the curve first, in the places of act and grad_g.
    if kind == SILU:
        for i in range(act.size):
            z = before if g[i] > before else g[i]
            below = one + _exponential(-alpha * z)
            s = one / below
            value = z / below
            # In this order nothing cancels where s rounds to 1.
            slope = s + (one - s) * value * alpha
            act[i] = value
            grad_g[i] = zero if g[i] > before else slope
    elif kind == GELU:
        near = T(_NEAR)
        for i in range(act.size):
            share = half * (one + math.erf(g[i] * T(_ROOT_HALF)))
            z = _clip(g[i], -near, near)
            act[i] = share * g[i]
            grad_g[i] = share + z * T(_DENSITY) * _exponential(z * z * -half)
    elif kind == GELU_TANH:
        near, linear, cubic = T(_NEAR), T(-_TWO_C), T(-_TWO_C * _K)
        steep, flat = T(3.0 * _TWO_C * _K), T(_TWO_C)
        for i in range(act.size):
            z = _clip(g[i], -near, near)
            below = one + _exponential(z * (z * z * cubic + linear))
            s = one / below
            value = g[i] / below
            act[i] = value
            grad_g[i] = s + (one - s) * value * (z * z * steep + flat)
    else:
        for i in range(act.size):
            z = zero if g[i] <= zero else g[i]
            act[i] = z if kind == RELU else z * z
            grad_g[i] = (one if g[i] > zero else zero) if kind == RELU else z + z
    if not gated:
        for i in range(act.size):
            grad_g[i] *= grad[i] * factor
        return
    for i in range(act.size):
        value = after if act[i] > after else act[i]
        inside = one if abs(u[i]) <= clip else zero
        grad_u[i] = grad[i] * factor * value * inside
    for i in range(act.size):
        slope = zero if act[i] > after else grad_g[i]
        grad_g[i] = grad[i] * factor * (slope * (_clip(u[i], -clip, clip) + shift))
    for i in range(act.size):
        value = after if act[i] > after else act[i]
        act[i] = value * (_clip(u[i], -clip, clip) + shift)
