"""The register tile of both grouped products: 256 threads multiply two panels in shared memory.

A panel is DEPTH steps deep; thread (tx, ty) = (t % 16, t // 16) owns rows ty, ty + 16, ... of one
and columns tx, tx + 16, ... of the other, so that a warp reads 16 neighbours and two broadcasts::

              16 columns   16 columns ...         right panel: scratch[RIGHT + k * RIGHT_STRIDE + c]
            +-------------+-------------
    16 rows | (tx, ty)    | (tx, ty)              left panel:  scratch[k * LEFT_STRIDE + r]
            +-------------+-------------
    16 rows | (tx, ty)    | (tx, ty)              every sum is a register, added to in ascending k

Finished sums go to the same scratch, SUMS_STRIDE apart, for whoever writes whole rows of them. The
strides spread what a warp stores over all 32 banks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from numba import cuda

from .words import inline, natural

SIDE = 16  # threads along a side
TILE = 64  # columns: four of each thread
COLUMNS = TILE // SIDE
DEPTH = 16
THREADS = SIDE * SIDE
RIGHT_STRIDE = TILE + 2
SUMS_STRIDE = TILE + 16


class Tile(NamedTuple):
    """A tile of so many rows: sizes in scratch, and what its threads do."""

    left_stride: int
    right: int
    scratch: int
    clear: Any  # (sums)
    add_products: Any  # (sums, scratch, tx, ty)
    store_sums: Any  # (sums, scratch, tx, ty)


@lru_cache(maxsize=8)
def make_tile(real: Any, height: int) -> Tile:
    """Return a tile of `height` rows, 16 to 64; variants share it, compiled."""
    ROWS, LEFT_STRIDE = height // SIDE, height + 2
    RIGHT = DEPTH * LEFT_STRIDE

    @inline
    def clear(sums):
        for r in range(ROWS):
            for c in range(COLUMNS):
                sums[r, c] = real(0)

    @inline
    def add_products(sums, scratch, tx, ty):
        left, right = cuda.local.array(ROWS, real), cuda.local.array(COLUMNS, real)
        for step in range(DEPTH):
            k = natural(step)
            for r in range(ROWS):
                left[r] = scratch[k * LEFT_STRIDE + ty + SIDE * r]
            for c in range(COLUMNS):
                right[c] = scratch[RIGHT + k * RIGHT_STRIDE + tx + SIDE * c]
            for r in range(ROWS):
                for c in range(COLUMNS):
                    sums[r, c] += left[r] * right[c]

    @inline
    def store_sums(sums, scratch, tx, ty):
        for r in range(ROWS):
            for c in range(COLUMNS):
                scratch[(ty + SIDE * r) * SUMS_STRIDE + tx + SIDE * c] = sums[r, c]

    size = max(RIGHT + DEPTH * RIGHT_STRIDE, height * SUMS_STRIDE)
    return Tile(LEFT_STRIDE, RIGHT, size, clear, add_products, store_sums)
