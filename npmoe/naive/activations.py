"""Expert activations and their derivatives, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from npmoe._typing import HostArray


def sigmoid(z: float) -> float:
    """Return 1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


def silu(z: float) -> float:
    """Return z * sigmoid(z)."""
    return z * sigmoid(z)


def silu_slope(z: float) -> float:
    """Return the derivative of silu."""
    return sigmoid(z) * (1.0 + z * (1.0 - sigmoid(z)))


def gelu(z: float) -> float:
    """Return z * Phi(z), Phi the normal distribution function."""
    return z * 0.5 * (1.0 + math.erf(z / math.sqrt(2.0)))


def gelu_slope(z: float) -> float:
    """Return the derivative of gelu, Phi(z) + z * phi(z)."""
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return 0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) + z * density


def relu(z: float) -> float:
    """Return max(z, 0)."""
    return max(z, 0.0)


def relu_slope(z: float) -> float:
    """Return the derivative of relu, taken as 0 at 0."""
    return 1.0 if z > 0 else 0.0


PLAIN: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "gelu": (gelu, gelu_slope),
    "relu": (relu, relu_slope),
}


def activate(gate_up: HostArray, name: str) -> HostArray:
    """Return the activation (I,) of one row; for swiglu the row is (g | u) and 2I long."""
    if name == "swiglu":
        g, u = np.split(gate_up, 2)
        return np.array([silu(g[i]) * u[i] for i in range(len(g))])
    return np.array([PLAIN[name][0](z) for z in gate_up])


def activate_backward(grad_act: HostArray, gate_up: HostArray, name: str) -> HostArray:
    """Return the gradient of `gate_up`."""
    if name == "swiglu":
        g, u = np.split(gate_up, 2)
        grad_g = [grad_act[i] * u[i] * silu_slope(g[i]) for i in range(len(g))]
        grad_u = [grad_act[i] * silu(g[i]) for i in range(len(g))]
        return np.array(grad_g + grad_u)
    return np.array([grad_act[i] * PLAIN[name][1](z) for i, z in enumerate(gate_up)])
