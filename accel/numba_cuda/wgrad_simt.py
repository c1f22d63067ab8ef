"""Weight gradients of the grouped product.

Of expert e, over its rows r in ascending order:

    out[e] = sum of grad_y[r] x[r]^T        (E, M, N)

exactly zero for an expert without rows; with `accumulate`, added to. The reference is
`npmoe.ops.grouped_gemm_wgrad`, eq. (8) and (10) of `npmoe.layer`; the twin is
`accel/kernels/wgrad_simt.cu`.

The plan: rows of an expert lie together, expert_offsets[e] ... expert_offsets[e + 1]; nothing is
padded. Thread block (n, m, e) owns 64 x 64 numbers of out[e] and walks down the rows of the expert,
DEPTH at a time. Both panels are as they lie in memory, a row of 64 neighbours for each step::

    grad_y (R, M), left panel: rows of out      x (R, N), right panel: columns of out

Where one of the two is by token, not by route (GATHER_X, GATHER_GRAD), its row is that of the
token, pair_ids[r] // top_k.
"""

from typing import Any

from numba import cuda
from numba.cuda.types import int32

from ..device.products import GATHER_GRAD, GATHER_X
from .tiles import COLUMNS, DEPTH, RIGHT_STRIDE, SIDE, SUMS_STRIDE, THREADS, TILE, make_tile
from .words import TYPES, WARP, bounds, natural, quotient

INTS = int32[::1]
WARPS = THREADS // WARP
SUMS = (TILE // SIDE, COLUMNS)


def grouped_wgrad(REAL: str, GATHER: int) -> Any:
    """Return the kernel of a variant: grid (column tiles, row tiles, experts), 256 threads."""
    real = TYPES[REAL]
    MATRIX, MATRICES = real[:, ::1], real[:, :, ::1]
    LEFT_STRIDE, RIGHT, SCRATCH, clear, add_products, store_sums = make_tile(real, TILE)

    @bounds(THREADS, 3)
    def kernel(
        grad_y: MATRIX, x: MATRIX, pair_ids: INTS, expert_offsets: INTS, top_k: int32, M: int32,
        N: int32, out: MATRICES, accumulate: int32,
    ):  # fmt: skip
        scratch = cuda.shared.array(SCRATCH, real)
        sums = cuda.local.array(SUMS, real)
        t, e = natural(cuda.threadIdx.x), natural(cuda.blockIdx.z)
        n0, m0 = natural(cuda.blockIdx.x) * TILE, natural(cuda.blockIdx.y) * TILE
        end = natural(expert_offsets[e + 1])
        clear(sums)
        r0 = natural(expert_offsets[e])
        while r0 < end:
            for j in range(DEPTH * TILE // THREADS):
                d, c = t // TILE + THREADS // TILE * j, t % TILE
                row = natural(r0 + d)
                left = right = real(0)
                if row < end:
                    token = row
                    if GATHER:
                        token = quotient(pair_ids[row], top_k)
                    if m0 + c < M:
                        left = grad_y[token if GATHER == GATHER_GRAD else row, m0 + c]
                    if n0 + c < N:
                        right = x[token if GATHER == GATHER_X else row, n0 + c]
                scratch[d * LEFT_STRIDE + c] = left
                scratch[RIGHT + d * RIGHT_STRIDE + c] = right
            cuda.syncthreads()
            add_products(sums, scratch, t % SIDE, t // SIDE % SIDE)
            cuda.syncthreads()
            r0 = natural(r0 + DEPTH)
        store_sums(sums, scratch, t % SIDE, t // SIDE % SIDE)
        cuda.syncthreads()
        r = t // WARP
        while r < TILE and m0 + r < M:
            c = t % WARP
            while c < TILE and n0 + c < N:
                total = scratch[r * SUMS_STRIDE + c]
                if accumulate:
                    total = out[e, m0 + r, n0 + c] + total
                out[e, m0 + r, n0 + c] = total
                c = natural(c + WARP)
            r = natural(r + WARPS)

    return kernel
