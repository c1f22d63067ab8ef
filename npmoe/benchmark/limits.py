"""The machine's two limits, measured: matrix products and reads from memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from npmoe.benchmark.result import Sample

GEMM_SIZE = 2048
READ_BYTES = 400_000_000
# Threads of the BLAS used last spin for about 0.1 s and slow the first reads: the best is kept.
_READS, _PRODUCTS = 8, 3


class Limits(Protocol):
    """What `run_benchmark` needs of the limits."""

    def measure(self) -> None:
        """Measure both once more."""

    def take(self) -> tuple[Sample, Sample]:
        """Return flop/s and bytes/s of the measurements since the last call."""

    def text(self) -> str:
        """Say what is measured."""


def best_seconds(function: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Return the least seconds of several calls."""
    least = math.inf
    for _ in range(times):
        start = clock()
        function()
        least = min(least, clock() - start)
    return least


class MeasuredLimits:
    """Flop/s of a square matrix product, and bytes/s of reading a buffer too large for caches.

    The buffer is read by Python threads, each taking the maximum of its part with
    ``numpy.maximum.reduce``, which releases the interpreter's lock; the best of eight. The product
    is ``numpy.matmul``, the best of three.

    Parameters
    ----------
    dtype : {"float32", "float64"}
    threads : int
        Of the reads; the product has those of its BLAS.
    clock : callable
        Returns seconds.
    gemm_size, read_bytes : int
        Of the problems.
    """

    def __init__(
        self,
        dtype: str,
        threads: int,
        *,
        clock: Callable[[], float] = time.perf_counter,
        gemm_size: int = GEMM_SIZE,
        read_bytes: int = READ_BYTES,
    ) -> None:
        self._clock = clock
        rng = np.random.default_rng(0)
        self._a = rng.standard_normal((gemm_size, gemm_size), dtype=np.dtype(dtype).type)
        self._b, self._c = self._a.T.copy(), np.empty_like(self._a)
        whole = np.ones(max(threads, read_bytes // 4), np.float32)
        self._read_bytes = whole.nbytes
        self._parts = np.array_split(whole, threads)
        self._pool = ThreadPoolExecutor(threads)
        self._gemm: list[float] = []
        self._read: list[float] = []
        self._read_all()  # the first call pays for threads and for touching memory
        self._multiply()

    def measure(self) -> None:
        """Measure both once more."""
        read = best_seconds(self._read_all, _READS, self._clock)
        self._read.append(self._read_bytes / read)
        multiplied = best_seconds(self._multiply, _PRODUCTS, self._clock)
        self._gemm.append(2 * self._a.shape[0] ** 3 / multiplied)

    def take(self) -> tuple[Sample, Sample]:
        """Return flop/s and bytes/s of the measurements since the last call."""
        found = Sample.of(self._gemm), Sample.of(self._read)
        self._gemm, self._read = [], []
        return found

    def text(self) -> str:
        """Say what is measured."""
        return (
            f"numpy.matmul of {self._a.shape[0]} in {self._a.dtype}, best of {_PRODUCTS}; reads "
            f"of {self._read_bytes / 1e9:.1f} GB, best of {_READS}"
        )

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown()

    def _multiply(self) -> None:
        np.matmul(self._a, self._b, out=self._c)

    def _read_all(self) -> None:
        list(self._pool.map(np.maximum.reduce, self._parts))
