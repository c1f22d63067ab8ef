"""Grouped product over sorted_token_ids: gather, multiply by the expert's matrix, epilogue.

The reference is `npmoe.ops.grouped_gemm` and, with its epilogues, eq. (3) to (11) of `npmoe.layer`;
the twin is `accel/kernels/grouped_simt.cu`. The plan, of blocks with BLOCK_M = 4::

    sorted_token_ids  1 4 6 6 | 3 6 6 6 | 0 2 5 6 | (anything)     num_tokens_post_padded  12
    expert_ids        0       | 1       | 2       |                 6 = num_routes: padding

Thread block (b, tile) takes entries b * BLOCK_M ... and columns tile * 64 ... of the matrix of
expert_ids[b]. It leaves at once behind num_tokens_post_padded, and where the expert is -1 (of
another rank). An entry p = t * top_k + k is a route: its row of x is row_ids[p], or with GATHER the
token p // top_k; its row of the results is row_ids[p]. Padding is multiplied as zeros and written
nowhere.

    x       (rows, K)
    weight  (E, N, K), or with TRANSPOSED (E, K, N); half precision as bits
    y       STORE              x W + bias                                             (R, N)
            ROUTED             w_p (x W + bias)
            ACTIVATE           x W + bias, if it is kept;  act = f(y)                 (R, N), (R, I)
            ACTIVATE_BACKWARD  from s = x W (R, I), the gradient of w_p act, and y as it was kept:
                               act = w_p f(y);  grad_y = w_p s f'(y);  dots = <s, f(y)> of a tile

With GATED, N = 2 I in the last two; then columns j and I + j make one activation, and half of an
ACTIVATE tile is gates. Every sum is REAL, in ascending order of K: nothing depends on how routes
are cut into blocks. Arrays that a variant does not use, or that are optional and not there (bias,
y), are empty.
"""

from typing import Any

from numba import cuda
from numba.cuda.types import int32

from ..device.products import ACTIVATE, ACTIVATE_BACKWARD, ROUTED, STORE
from .curves import make_curves
from .tiles import COLUMNS, DEPTH, RIGHT_STRIDE, SIDE, SUMS_STRIDE, THREADS, TILE, make_tile
from .words import TYPES, WARP, bounds, inline, natural, quotient, warp_sum, widen_of

INTS = int32[::1]
WARPS = THREADS // WARP


def grouped_gemm(
    REAL: str, WEIGHT: str, EPILOGUE: int, GATED: int, GATHER: int, TRANSPOSED: int, BLOCK_M: int
) -> Any:
    """Return the kernel of a variant: grid (blocks, column tiles), 256 threads."""
    real, widen = TYPES[REAL], widen_of(WEIGHT)
    MATRIX, VECTOR, MATRICES = real[:, ::1], real[::1], TYPES[WEIGHT][:, :, ::1]
    activate, activate_gated, activate_back, activate_gated_back = make_curves(real)
    LEFT_STRIDE, RIGHT, SCRATCH, clear, add_products, store_sums = make_tile(real, BLOCK_M)
    HEIGHTS = BLOCK_M // SIDE
    SUMS = (HEIGHTS, COLUMNS)
    SPLIT = GATED and EPILOGUE == ACTIVATE  # a tile is 32 gates and their 32 ups
    WIDTH = TILE // 2 if SPLIT else TILE
    HALVED = GATED and EPILOGUE == ACTIVATE_BACKWARD  # N is that of y

    # Column of the matrix at column c of a tile, or -1.
    @inline
    def column_of(tile, c, columns):
        n = tile * WIDTH + c % WIDTH
        if SPLIT:
            half = columns >> 1
            inside = n < half
            n = n if c < WIDTH else n + half
        else:
            inside = n < columns
        return n if inside else -1

    @bounds(THREADS, 3)
    def kernel(
        x: MATRIX, weight: MATRICES, sorted_token_ids: INTS, expert_ids: INTS,
        num_tokens_post_padded: INTS, row_ids: INTS, num_routes: int32, top_k: int32, N: int32,
        K: int32, bias: MATRIX, topk_weights: VECTOR, y: MATRIX, act: MATRIX, grad_y: MATRIX,
        dots: MATRIX, kind: int32, alpha: real, before: real, after: real, clip: real, shift: real,
    ):  # fmt: skip
        scratch = cuda.shared.array(SCRATCH, real)
        routes = cuda.shared.array(BLOCK_M, int32)
        sources = cuda.shared.array(BLOCK_M, int32)
        sums = cuda.local.array(SUMS, real)

        # Who is it for?
        block, tile = natural(cuda.blockIdx.x), natural(cuda.blockIdx.y)
        if block * BLOCK_M >= num_tokens_post_padded[0] or expert_ids[block] < 0:
            return
        e = natural(expert_ids[block])
        t = natural(cuda.threadIdx.x)
        if t < BLOCK_M:
            p = sorted_token_ids[block * BLOCK_M + t]
            source = -1
            if p < num_routes:
                source = quotient(p, top_k) if GATHER else row_ids[natural(p)]
            routes[t] = p
            sources[t] = source
        cuda.syncthreads()

        # Multiply: panels of DEPTH steps, filled by all, neighbours reading neighbours.
        tx, ty = t % SIDE, t // SIDE % SIDE
        columns = natural(N >> 1) if HALVED else natural(N)
        matrix = weight[e]
        clear(sums)
        k0 = 0
        while k0 < K:
            for j in range(HEIGHTS):
                k, r = tx, ty + SIDE * j
                value = real(0)
                if sources[r] >= 0 and k0 + k < K:
                    value = x[natural(sources[r]), k0 + k]
                scratch[k * LEFT_STRIDE + r] = value
            for j in range(COLUMNS):
                if TRANSPOSED:
                    k, c = t // TILE + THREADS // TILE * j, t % TILE
                else:
                    k, c = tx, ty + SIDE * j
                n = column_of(tile, c, columns)
                value = real(0)
                if n >= 0 and k0 + k < K:
                    at = natural(n)
                    value = widen(matrix[k0 + k, at] if TRANSPOSED else matrix[at, k0 + k])
                scratch[RIGHT + k * RIGHT_STRIDE + c] = value
            cuda.syncthreads()
            add_products(sums, scratch, tx, ty)
            cuda.syncthreads()
            k0 = natural(k0 + DEPTH)
        store_sums(sums, scratch, tx, ty)
        cuda.syncthreads()

        # Finish: a warp takes a row, so that a row's dot has one order.
        curve = kind, alpha, before, after, clip, shift
        lane, r = t % WARP, t // WARP
        half = natural(N >> 1) if GATED else natural(N)
        while r < BLOCK_M:
            p = routes[r]
            if p < num_routes:
                p = natural(p)
                row, dot, c = natural(row_ids[p]), real(0), lane
                while c < WIDTH:
                    n = column_of(tile, c, columns)
                    if n >= 0:
                        n = natural(n)
                        value = scratch[r * SUMS_STRIDE + c]
                        if EPILOGUE != ACTIVATE_BACKWARD and bias.size:
                            value += bias[e, n]
                        if EPILOGUE == STORE:
                            y[row, n] = value
                        elif EPILOGUE == ROUTED:
                            y[row, n] = topk_weights[p] * value
                        elif EPILOGUE == ACTIVATE:
                            if y.size:
                                y[row, n] = value
                            if GATED:
                                up = scratch[r * SUMS_STRIDE + c + WIDTH]
                                if bias.size:
                                    up += bias[e, half + n]
                                if y.size:
                                    y[row, half + n] = up
                                act[row, n] = activate_gated(curve, value, up)
                            else:
                                act[row, n] = activate(curve, value)
                        else:
                            w = topk_weights[p]
                            if GATED:
                                result, grad_y[row, n], grad_y[row, half + n] = activate_gated_back(
                                    curve, y[row, n], y[row, half + n], w * value
                                )
                            else:
                                result, grad_y[row, n] = activate_back(curve, y[row, n], w * value)
                            act[row, n] = w * result
                            dot += value * result
                    c = natural(c + WARP)
                if EPILOGUE == ACTIVATE_BACKWARD:
                    dot = warp_sum(dot)
                    if lane == 0:
                        dots[row, tile] = dot
            r = natural(r + WARPS)

    return kernel
