"""The grouped products that there are: which file, how large a tile, how much shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """One implementation of `grouped_gemm` and `grouped_wgrad`.

    Attributes
    ----------
    grouped, wgrad : str
        Files of the two kernels.
    operand : {"tf32", "bfloat16", "float16"} or None
        What rows and matrices are rounded to before they are multiplied; None: nothing is rounded.
    block_sizes : tuple of int
        Rows of a tile that exist, ascending.
    tile_n : int
        Columns of a tile.
    wgrad_tile : (int, int)
        Rows and columns of a tile of a weight gradient.
    threads, shared_mem : callable
        Threads, and bytes of dynamic shared memory, for a block size.
    wgrad_threads, wgrad_shared_mem : int
    alignment : int
        Bytes at whose multiples rows must begin for the variant ALIGNED; 0: there is one for all.
    """

    grouped: str
    wgrad: str
    operand: str | None
    block_sizes: tuple[int, ...]
    tile_n: int
    wgrad_tile: tuple[int, int]
    threads: Callable[[int], int]
    shared_mem: Callable[[int], int]
    wgrad_threads: int
    wgrad_shared_mem: int
    alignment: int

    @property
    def stored(self) -> str | None:
        """Dtype of operands in memory: tf32 is float32 until it is multiplied."""
        return "float32" if self.operand == "tf32" else self.operand

    def block_size(self, num_routes: int, num_experts: int) -> int:
        """Return the rows of a tile: the smallest that hold twice an expert's mean, if any do.

        Padding wastes less than the smaller tile would lose: with 16 rows a matrix is read
        once for 16 routes, with 64 once for 64.
        """
        mean = num_routes / max(1, num_experts)
        for size in self.block_sizes:
            if size >= 2 * mean:
                return size
        return self.block_sizes[-1]


SIMT = Tiling(
    grouped="grouped_simt",
    wgrad="wgrad_simt",
    operand=None,
    block_sizes=(16, 64),
    tile_n=64,
    wgrad_tile=(64, 64),
    threads=lambda _: 256,
    shared_mem=lambda _: 0,
    wgrad_threads=256,
    wgrad_shared_mem=0,
    alignment=0,
)


def tensor_cores(operand: str) -> Tiling:
    """Return the products on tensor cores; sizes are those of `grouped_mma.cu`, `wgrad_mma.cu`."""
    return Tiling(
        grouped="grouped_mma",
        wgrad="wgrad_mma",
        operand=operand,
        block_sizes=(16, 64, 128),
        tile_n=128,
        wgrad_tile=(128, 128),
        threads=lambda block_size: max(64, 2 * block_size),
        shared_mem=lambda block_size: max(256 * (block_size + 128), 544 * block_size),
        wgrad_threads=256,
        wgrad_shared_mem=69632,
        alignment=16,
    )


def real_name(dtype: Any) -> str:
    """Return float or double."""
    return "double" if np.dtype(dtype) == np.float64 else "float"


def element_name(dtype: Any) -> str:
    """Return a type of `accel/kernels/scalars.cuh`."""
    name = np.dtype(dtype).name
    return {"float16": "half16", "bfloat16": "bfloat16"}.get(name) or real_name(dtype)
