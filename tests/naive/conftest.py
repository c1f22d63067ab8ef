"""Central differences, independent of anything in the package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

STEP = 2.0**-11


def central_differences(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """Return the gradient of f at x by Richardson's extrapolation of central differences.

    The truncation error is f'''''(x) h^4 / 7.5 = 8e-15 f''''' and the rounding error n u |f| / h
    = n * 3e-13 |f| for f computed with n roundings, so 1e-10 suits values of order 1.
    """
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        quotients = []
        for h in (STEP, 2.0 * STEP):
            ahead, behind = x.copy(), x.copy()
            ahead[i] += h
            behind[i] -= h
            quotients.append((f(ahead) - f(behind)) / (2.0 * h))
        gradient[i] = (4.0 * quotients[0] - quotients[1]) / 3.0
    return gradient


@pytest.fixture
def assert_gradient() -> Callable[[Callable[[np.ndarray], float], np.ndarray, np.ndarray], None]:
    def check(f: Callable[[np.ndarray], float], x: np.ndarray, gradient: np.ndarray) -> None:
        expected = central_differences(f, x)
        error = np.abs(gradient - expected)
        scale = max(1.0, abs(f(x)), float(np.abs(expected).max(initial=0.0)))
        assert (error <= 1e-10 * scale).all(), f"{gradient} against {expected}"

    return check
