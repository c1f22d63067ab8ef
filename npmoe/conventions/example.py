"""The example on which every convention is computed: all numbers are literal."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import HostArray

NUM_EXPERTS, TOP_K = 8, 2
LOGITS: HostArray = np.array(
    [
        [2.0, 1.5, -1.0, 0.5, 0.25, -0.5, 0.0, 1.0],
        [0.0, 0.75, 1.25, -0.5, 2.25, 0.5, -1.5, 1.75],
        [-1.5, 1.0, 0.0, 2.0, 0.75, 1.75, -0.25, 0.5],
        [1.25, -0.75, 0.5, 0.25, 1.5, -1.0, 2.5, 0.0],
    ]
)
SELECTION_BIAS: HostArray = np.array([-0.25, 0.0, 0.25, 0.0, -0.125, 0.0, 0.0, 0.25])
# What a standard normal generator gives here; the router multiplies it by its deviation.
NOISE: HostArray = np.array(
    [
        [-1.0, 0.5, 0.0, 0.0, 1.5, 0.0, 2.0, 0.5],
        [0.0, 2.0, -0.5, 0.0, -4.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.5, -1.0, 6.0, -3.0, 0.0, 0.0],
        [2.0, 0.0, 0.0, 0.0, 0.5, 0.0, -1.5, 0.0],
    ]
)
UNIFORM: HostArray = np.array([0.75, 0.5, 0.9, 0.25])
# The experts of four token ids, for hash routing.
TABLE: HostArray = np.array([[5, 2], [0, 7], [3, 1], [6, 4]])


class FixedDraws(np.random.Generator):
    """A generator that gives `NOISE` and `UNIFORM`, so that no release of NumPy changes a table."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def standard_normal(self, *_: Any, **__: Any) -> Any:
        """Return NOISE."""
        return NOISE.copy()

    def random(self, *_: Any, **__: Any) -> Any:
        """Return UNIFORM."""
        return UNIFORM.copy()
