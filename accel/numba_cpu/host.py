"""What this processor offers, and the tile sizes that follow from it."""

from __future__ import annotations

import functools

import llvmlite.binding as llvm
from numba import types


@functools.cache
def vector_bytes() -> int:
    """Return the width of a vector register: 64 with AVX-512, 32 with AVX2, else 16."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 64
    return 32 if features.get("avx2") else 16


def lanes(dtype: types.Float) -> int:
    """Return how many numbers of a Numba float type one register holds."""
    return vector_bytes() // (dtype.bitwidth // 8)


# Of a cache line.
LINE_BYTES = 64

# Accumulators of the outer-product tile: ROWS broadcasts times VECTORS registers. 24 of the 32
# registers of AVX-512 and of ARM; 12 of the 16 of AVX2 and SSE.
ROWS = 6
VECTORS = 4 if vector_bytes() == 64 or not llvm.get_host_cpu_features().get("sse2") else 2
# The inner-product tile: DOT x DOT accumulators.
DOT = 4 if VECTORS == 4 else 2
