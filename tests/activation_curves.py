"""What the smooth activations are, by SciPy: a second opinion for their tests."""

from __future__ import annotations

import math

import numpy as np
from scipy import special, stats


def curve(name: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return values and slopes of what the gate half goes through, by SciPy."""
    if "relu" in name or name == "reglu":
        positive = np.where(z > 0, z, 0.0)
        return (positive**2, 2 * positive) if name == "relu2" else (positive, np.heaviside(z, 0.0))
    if name in ("gelu", "geglu"):
        return z * special.ndtr(z), special.ndtr(z) + z * stats.norm.pdf(z)
    if name in ("gelu_tanh", "geglu_tanh"):
        c = math.sqrt(2 / math.pi)
        y = c * (z + 0.044715 * z**3)
        value = 0.5 * z * (1 + np.tanh(y))
        return value, 0.5 * (1 + np.tanh(y)) + 0.5 * z / np.cosh(y) ** 2 * c * (1 + 0.134145 * z**2)
    a = 1.702 if name == "swiglu_oai" else 1.0
    return z * special.expit(a * z), special.expit(a * z) + a * z * special.expit(
        a * z
    ) * special.expit(-a * z)
