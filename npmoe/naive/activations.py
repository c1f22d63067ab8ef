"""Expert activations and their derivatives, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from npmoe._typing import HostArray


def sigmoid(z: float) -> float:
    """Return 1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def silu(z: float, alpha: float = 1.0) -> float:
    """Return z * sigmoid(alpha * z)."""
    return z * sigmoid(alpha * z)


def silu_slope(z: float, alpha: float = 1.0) -> float:
    """Return the derivative of silu."""
    return sigmoid(alpha * z) * (1.0 + alpha * z * (1.0 - sigmoid(alpha * z)))


def gelu(z: float) -> float:
    """Return z * Phi(z), Phi the normal distribution function."""
    return z * 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def gelu_slope(z: float) -> float:
    """Return the derivative of gelu, Phi(z) + z * phi(z)."""
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) + z * density


def gelu_tanh(z: float) -> float:
    """Return z * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z^3))) / 2."""
    return 0.5 * z * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z)))


def gelu_tanh_slope(z: float) -> float:
    """Return the derivative of gelu_tanh."""
    t = math.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z * z * z))
    inner = math.sqrt(2.0 / math.pi) * (1.0 + 3.0 * 0.044715 * z * z)
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner


def relu(z: float) -> float:
    """Return max(z, 0)."""
    return max(z, 0.0)


def relu_slope(z: float) -> float:
    """Return the derivative of relu, taken as 0 at 0."""
    return 1.0 if z > 0 else 0.0


PLAIN: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "silu": (silu, silu_slope),
    "gelu": (gelu, gelu_slope),
    "gelu_tanh": (gelu_tanh, gelu_tanh_slope),
    "relu": (relu, relu_slope),
    "relu2": (lambda z: relu(z) ** 2, lambda z: 2.0 * relu(z)),
}
# Of the gated activations: the plain one that the gate half goes through.
GATED = {
    "swiglu": "silu",
    "swiglu_clamp_pre": "silu",
    "swiglu_clamp_post": "silu",
    "swiglu_oai": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
}
LIMITS = {"swiglu_clamp_pre": 10.0, "swiglu_clamp_post": 7.0, "swiglu_oai": 7.0}


def gated(
    g: float, u: float, name: str, alpha: float | None = None, limit: float | None = None
) -> tuple[float, float, float]:
    """Return the activation of one pair (g, u), and its derivatives by g and by u."""
    if name not in LIMITS:
        value, slope = PLAIN[GATED[name]]
        return value(g) * u, slope(g) * u, value(g)
    c = LIMITS[name] if limit is None else limit
    inside_u = 1.0 if -c <= u <= c else 0.0
    clipped = max(-c, min(u, c))
    if name == "swiglu_oai":
        a = 1.702 if alpha is None else alpha
        glu = silu(min(g, c), a)
        slope_g = silu_slope(g, a) * (clipped + 1.0) if g <= c else 0.0
        return glu * (clipped + 1.0), slope_g, glu * inside_u
    if name == "swiglu_clamp_pre":
        glu = silu(min(g, c))
        inside_g = g <= c
    else:
        glu = min(silu(g), c)
        inside_g = silu(g) <= c
    return glu * clipped, silu_slope(g) * clipped if inside_g else 0.0, glu * inside_u


def activate(
    gate_up: HostArray, name: str, alpha: float | None = None, limit: float | None = None
) -> HostArray:
    """Return the activation (I,) of one row; of a gated one the row is (g | u) and 2I long."""
    if name in GATED:
        pairs = zip(*np.split(gate_up, 2), strict=True)
        return np.array([gated(g, u, name, alpha, limit)[0] for g, u in pairs])
    return np.array([PLAIN[name][0](z) for z in gate_up])


def activate_backward(
    grad_act: HostArray,
    gate_up: HostArray,
    name: str,
    alpha: float | None = None,
    limit: float | None = None,
) -> HostArray:
    """Return the gradient of `gate_up`."""
    if name in GATED:
        pairs = zip(*np.split(gate_up, 2), strict=True)
        slopes = [gated(g, u, name, alpha, limit)[1:] for g, u in pairs]
        grad_g = [grad_act[i] * by_g for i, (by_g, _) in enumerate(slopes)]
        grad_u = [grad_act[i] * by_u for i, (_, by_u) in enumerate(slopes)]
        return np.array(grad_g + grad_u)
    return np.array([grad_act[i] * PLAIN[name][1](z) for i, z in enumerate(gate_up)])
