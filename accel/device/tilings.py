"""The grouped products that there are: which file, how large a tile, how much shared memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Tiling:
    """One implementation of `grouped_gemm` and `grouped_wgrad`.

    Attributes
    ----------
    grouped, wgrad : str
        Files of the two kernels.
    operand : str or None
        What rows and matrices are rounded to before they are multiplied; None: nothing is rounded.
    block_sizes : tuple of int
        Rows of a tile that exist, ascending.
    tile_n : int
        Columns of a tile.
    threads : int
    wgrad_tile : (int, int)
        Rows and columns of a tile of a weight gradient.
    options : callable
        ``options(block_size, aligned)``: what else the kernels are compiled with.
    shared_mem, wgrad_shared_mem : callable
        Bytes of dynamic shared memory, of a block size and of nothing.
    """

    grouped: str
    wgrad: str
    operand: str | None
    block_sizes: tuple[int, ...]
    tile_n: int
    threads: int
    wgrad_tile: tuple[int, int]
    shared_mem: Callable[[int], int]
    wgrad_shared_mem: int
    alignment: int  # bytes; 0: there is one variant for all

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

    def is_aligned(self, *lengths: int) -> bool:
        """Say whether rows of these lengths, in bytes, begin at multiples of the alignment."""
        return self.alignment > 0 and all(n % self.alignment == 0 for n in lengths)


SIMT = Tiling(
    grouped="grouped_simt",
    wgrad="wgrad_simt",
    operand=None,
    block_sizes=(16, 64),
    tile_n=64,
    threads=256,
    wgrad_tile=(64, 64),
    shared_mem=lambda _: 0,
    wgrad_shared_mem=0,
    alignment=0,
)


def real_name(dtype: Any) -> str:
    """Return float or double."""
    return "double" if np.dtype(dtype) == np.float64 else "float"


def element_name(dtype: Any) -> str:
    """Return a type of `accel/kernels/scalars.cuh`."""
    name = np.dtype(dtype).name
    return {"float16": "half16", "bfloat16": "bfloat16"}.get(name) or real_name(dtype)
