"""How many blocks of rows uniform routing is expected to fill."""

from __future__ import annotations

import numpy as np

from npmoe._typing import HostArray
from npmoe.benchmark.cases import Case


class UniformLoad:
    """Every token chooses K of E experts, all choices alike: an expert has Binomial(T, K/E) rows.

    Attributes
    ----------
    num_rows : int
        T*K.
    used_experts : float
        Experts with a row, expected.
    """

    def __init__(self, case: Case) -> None:
        T, _, _, E, K = case.sizes
        self.num_rows, self._num_experts = T * K, E
        self._rows = np.arange(T + 1, dtype=np.float64)  # that an expert may have
        self._chances = _binomial(T, K / E)
        self.used_experts = E * float(1.0 - self._chances[0])

    def blocks(self, size: int) -> float:
        """Return the expected blocks of `size` rows, each of one expert."""
        return self._num_experts * float(self._chances @ np.ceil(self._rows / size))

    def padding(self, size: int) -> float:
        """Return rows of blocks per row."""
        return self.blocks(size) * size / self.num_rows


def _binomial(n: int, p: float) -> HostArray:
    """Return the chances of 0..n successes."""
    if p == 1.0:
        certain: HostArray = np.eye(1, n + 1, n)[0]
        return certain
    k = np.arange(1.0, n + 1)
    ratios = np.log((n + 1 - k) / k) + np.log(p) - np.log1p(-p)  # of chance k to chance k - 1
    logs = n * np.log1p(-p) + np.concatenate([[0.0], np.cumsum(ratios)])
    chances: HostArray = np.exp(logs)
    return chances
