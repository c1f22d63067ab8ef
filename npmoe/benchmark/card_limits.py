"""A device's two limits, measured: matrix products and copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from npmoe.benchmark.card import Card
from npmoe.benchmark.limits import best_seconds
from npmoe.benchmark.result import Sample

GEMM_SIZE = 8192
COPY_BYTES = 2**30
_COPIES, _PRODUCTS = 8, 3
# CuPy multiplies no bfloat16; on every card since sm_80 both half types have one dense rate.
_STORED = {"bfloat16": "float16", "float16": "float16"}


class CardLimits:
    """Flop/s of a square matrix product, and bytes/s of a copy between two large buffers.

    The product is that of the array library (cuBLAS), in the type that the backends' products
    round to: float32 and float64 as they are, with TF32 off; tf32; or float16 with float32 sums,
    which stands for bfloat16 too. A copy counts the bytes read and the bytes written. Each timed
    call ends with waiting for the device; the best of 3 and of 8.

    Parameters
    ----------
    card : Card
    dtype : {"float32", "float64"}
        Of everything but the products.
    operands : {"tf32", "bfloat16", "float16"} or None
        What products round to.
    clock : callable
        Returns seconds.
    gemm_size, copy_bytes : int
        Of the problems.
    """

    def __init__(
        self,
        card: Card,
        dtype: str,
        operands: str | None,
        *,
        clock: Callable[[], float] = time.perf_counter,
        gemm_size: int = GEMM_SIZE,
        copy_bytes: int = COPY_BYTES,
    ) -> None:
        self._card, self._clock, self._operands = card, clock, operands
        self._stored = _STORED.get(operands or "", dtype)
        rng = np.random.default_rng(0)
        draw = rng.standard_normal((gemm_size, gemm_size), dtype=np.float32)
        self._a = card.asarray(draw.astype(self._stored))
        self._from = card.asarray(np.ones(copy_bytes // 4, np.float32))
        self._to = card.asarray(np.zeros(copy_bytes // 4, np.float32))
        self._gemm: list[float] = []
        self._copy: list[float] = []
        self._copy_all()  # the first calls pay for loading libraries
        self._multiply()

    def text(self) -> str:
        """Say what was measured."""
        kind = {
            "tf32": "float32 with TF32",
            "bfloat16": "float16, whose rate is bfloat16's",
        }.get(self._operands or "", self._stored)
        off = " with TF32 off" if kind == "float32" else ""
        return (
            f"product of {self._a.shape[0]} in {kind}{off}, best of {_PRODUCTS}; copy of "
            f"{4 * self._from.size / 1e9:.1f} GB, read and written, best of {_COPIES}"
        )

    def measure(self) -> None:
        """Measure both once more."""
        copied = best_seconds(self._copy_all, _COPIES, self._clock)
        self._copy.append(2 * 4 * self._from.size / copied)
        multiplied = best_seconds(self._multiply, _PRODUCTS, self._clock)
        self._gemm.append(2 * self._a.shape[0] ** 3 / multiplied)

    def take(self) -> tuple[Sample, Sample]:
        """Return flop/s and bytes/s of the measurements since the last call."""
        found = Sample.of(self._gemm), Sample.of(self._copy)
        self._gemm, self._copy = [], []
        return found

    def _multiply(self) -> None:
        with self._card.products(tf32=self._operands == "tf32"):
            self._a @ self._a
            self._card.synchronize()

    def _copy_all(self) -> None:
        self._to[...] = self._from
        self._card.synchronize()
