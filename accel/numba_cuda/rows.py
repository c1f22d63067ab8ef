"""What moves rows and adds them up; the twin is `accel/kernels/rows.cu`.

The plan: a block of 128 threads for each row, its threads along the columns; where a route gets a
dot, a warp for each route. Grids cover T*K rows, since the host does not know R; those behind the
last, expert_offsets[E], are neither read nor written (but by the activation, where they mean
nothing). Rows lie one after another, (R, N); the reference is `npmoe.ops`.

Sums have one order: slots ascending, rows ascending, columns by lane and then in a tree. No
atomics. Each function returns its kernel for REAL, float or double.
"""

from typing import Any

from numba import cuda
from numba.cuda.types import int32

from ..device.rows import THREADS
from .curves import make_curves
from .words import TYPES, WARP, bounds, expert_of_entry, natural, quotient, warp_sum, widen_of

INTS = int32[::1]
WARPS = THREADS // WARP


def gather_rows(REAL: str) -> Any:
    """rows[r] = x[token of r]."""
    real = TYPES[REAL]
    MATRIX = real[:, ::1]

    @bounds(THREADS)
    def kernel(x: MATRIX, token_ids: INTS, N: int32, rows: MATRIX):
        row = natural(cuda.blockIdx.x)
        if token_ids[row] < 0:
            return
        source, out = x[natural(token_ids[row])], rows[row]
        n = natural(cuda.threadIdx.x)
        while n < N:
            out[n] = source[n]
            n = natural(n + THREADS)

    return kernel


def scale_rows(REAL: str) -> Any:
    """rows[r] = x[r] * weight of the route of r."""
    real = TYPES[REAL]
    MATRIX, VECTOR = real[:, ::1], real[::1]

    @bounds(THREADS)
    def kernel(x: MATRIX, pair_ids: INTS, topk_weights: VECTOR, N: int32, rows: MATRIX):
        row = natural(cuda.blockIdx.x)
        if pair_ids[row] < 0:
            return
        weight = topk_weights[natural(pair_ids[row])]
        source, out = x[row], rows[row]
        n = natural(cuda.threadIdx.x)
        while n < N:
            out[n] = source[n] * weight
            n = natural(n + THREADS)

    return kernel


def spread_experts(REAL: str) -> Any:
    """rows[r] = values[expert of r]."""
    real = TYPES[REAL]
    MATRIX = real[:, ::1]

    @bounds(THREADS)
    def kernel(
        values: MATRIX, pair_ids: INTS, expert_offsets: INTS, num_experts: int32, N: int32,
        rows: MATRIX,
    ):  # fmt: skip
        row = natural(cuda.blockIdx.x)
        if pair_ids[row] < 0:
            return
        source, out = values[expert_of_entry(expert_offsets, num_experts, row)], rows[row]
        n = natural(cuda.threadIdx.x)
        while n < N:
            out[n] = source[n]
            n = natural(n + THREADS)

    return kernel


def combine_rows(REAL: str) -> Any:
    """(R, N) -> (T, N), slots in ascending order; topk_weights may be empty."""
    real = TYPES[REAL]
    MATRIX, VECTOR = real[:, ::1], real[::1]

    @bounds(THREADS)
    def kernel(
        rows: MATRIX, row_ids: INTS, topk_weights: VECTOR, N: int32, top_k: int32, out: MATRIX
    ):
        token = natural(cuda.blockIdx.x)
        first, weighted = natural(token * top_k), topk_weights.size != 0
        n = natural(cuda.threadIdx.x)
        while n < N:
            total = real(0)
            k = 0
            while k < top_k:
                p = natural(first + k)
                if row_ids[p] >= 0:
                    value = rows[natural(row_ids[p]), n]
                    if weighted:
                        value = topk_weights[p] * value
                    total += value
                k += 1
            out[token, n] = total
            n = natural(n + THREADS)

    return kernel


def row_dot(REAL: str) -> Any:
    """Inner products <a, b> of the row of every route, 0 where it has none: a warp for each."""
    real = TYPES[REAL]
    MATRIX, VECTOR = real[:, ::1], real[::1]

    @bounds(THREADS)
    def kernel(a: MATRIX, b: MATRIX, row_ids: INTS, num_routes: int32, N: int32, out: VECTOR):
        t = natural(cuda.threadIdx.x)
        p, lane = natural(cuda.blockIdx.x) * WARPS + t // WARP, t % WARP
        if p >= num_routes:
            return
        total = real(0)
        if row_ids[p] >= 0:
            left, right = a[natural(row_ids[p])], b[natural(row_ids[p])]
            n = lane
            while n < N:
                total += left[n] * right[n]
                n = natural(n + WARP)
        total = warp_sum(total)
        if lane == 0:
            out[p] = total

    return kernel


def finish_weights(REAL: str) -> Any:
    """Gradient of a route's weight: the dots of its tiles, and <grad_output, down_bias>."""
    real = TYPES[REAL]
    MATRIX, VECTOR = real[:, ::1], real[::1]

    @bounds(THREADS)
    def kernel(
        dots: MATRIX, tiles: int32, grad_output: MATRIX, bias: MATRIX, row_ids: INTS,
        expert_offsets: INTS, num_experts: int32, num_routes: int32, top_k: int32, N: int32,
        out: VECTOR,
    ):  # fmt: skip
        t = natural(cuda.threadIdx.x)
        p, lane = natural(cuda.blockIdx.x) * WARPS + t // WARP, t % WARP
        if p >= num_routes:
            return
        total = real(0)
        if row_ids[p] >= 0:
            row = natural(row_ids[p])
            of_tiles = dots[row]
            n = lane
            while n < tiles:
                total += of_tiles[n]
                n = natural(n + WARP)
            if bias.size:
                of_expert = bias[expert_of_entry(expert_offsets, num_experts, row)]
                grad = grad_output[quotient(p, top_k)]
                n = lane
                while n < N:
                    total += grad[n] * of_expert[n]
                    n = natural(n + WARP)
        total = warp_sum(total)
        if lane == 0:
            out[p] = total

    return kernel


def segment_sum(REAL: str, OPERAND: str) -> Any:
    """(R, N) -> (E, N), rows ascending; with topk_weights, rows are tokens' (T, N), weighted."""
    real = TYPES[REAL]
    widen, ROWS, MATRIX, VECTOR = widen_of(OPERAND), TYPES[OPERAND][:, ::1], real[:, ::1], real[::1]

    @bounds(THREADS)
    def kernel(
        rows: ROWS, pair_ids: INTS, topk_weights: VECTOR, expert_offsets: INTS, top_k: int32,
        N: int32, out: MATRIX, accumulate: int32,
    ):  # fmt: skip
        n, e = natural(cuda.blockIdx.x * THREADS + cuda.threadIdx.x), natural(cuda.blockIdx.y)
        if n >= N:
            return
        total, weighted = real(0), topk_weights.size != 0
        row, end = natural(expert_offsets[e]), natural(expert_offsets[e + 1])
        while row < end:
            if weighted:
                pair = natural(pair_ids[row])
                total += topk_weights[pair] * widen(rows[quotient(pair, top_k), n])
            else:
                total += widen(rows[row, n])
            row = natural(row + 1)
        if accumulate:
            total = out[e, n] + total
        out[e, n] = total

    return kernel


def activation(REAL: str) -> Any:
    """(R, 2I) -> (R, I), gates in the first half; (R, I) -> (R, I) if not gated."""
    real = TYPES[REAL]
    MATRIX, (activate, activate_gated, _, _) = real[:, ::1], make_curves(real)

    @bounds(THREADS)
    def kernel(
        gate_up: MATRIX, I: int32, gated: int32, kind: int32, alpha: real, before: real,
        after: real, clip: real, shift: real, act: MATRIX,
    ):  # fmt: skip
        curve = kind, alpha, before, after, clip, shift
        row = natural(cuda.blockIdx.x)
        given, out = gate_up[row], act[row]
        i = natural(cuda.threadIdx.x)
        while i < I:
            if gated:
                out[i] = activate_gated(curve, given[i], given[natural(I + i)])
            else:
                out[i] = activate(curve, given[i])
            i = natural(i + THREADS)

    return kernel


def activation_backward(REAL: str) -> Any:
    """grad_act (R, I), gate_up -> grad_gate_up."""
    real = TYPES[REAL]
    MATRIX, (_, _, activate_back, activate_gated_back) = real[:, ::1], make_curves(real)

    @bounds(THREADS)
    def kernel(
        grad_act: MATRIX, gate_up: MATRIX, I: int32, gated: int32, kind: int32, alpha: real,
        before: real, after: real, clip: real, shift: real, grad_gate_up: MATRIX,
    ):  # fmt: skip
        curve = kind, alpha, before, after, clip, shift
        row = natural(cuda.blockIdx.x)
        grad, given, out = grad_act[row], gate_up[row], grad_gate_up[row]
        i = natural(cuda.threadIdx.x)
        while i < I:
            if gated:
                up = natural(I + i)
                _, out[i], out[up] = activate_gated_back(curve, given[i], given[up], grad[i])
            else:
                _, out[i] = activate_back(curve, given[i], grad[i])
            i = natural(i + THREADS)

    return kernel
