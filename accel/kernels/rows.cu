// What moves rows and adds them up: a block for each row, a warp for each route that gets a dot.
// Sums have one order: slots ascending, rows ascending, columns by lane and then in a tree. No
// atomics, and no 64 bit division.
//
// -D REAL; CAST_TO for `cast`. Grids cover T*K rows; those behind the last, expert_offsets[E], are
// neither read nor written (but by `activation` and its backward, where they mean nothing).
#include "curves.cuh"

#define WARPS 4  // of a block, where a warp has a route

// The expert of a row: the last one whose first row is at most `row`.
DEVICE int expert_of_row(const int *expert_offsets, int num_experts, int row) {
    int low = 0, high = num_experts - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (expert_offsets[middle] <= row) low = middle;
        else high = middle - 1;
    }
    return low;
}

extern "C" __global__ void gather_rows(const REAL *__restrict__ x, const int *__restrict__ token_ids,
                                       int N, REAL *__restrict__ rows) {
    const int64 row = blockIdx.x, token = token_ids[row];
    if (token < 0) return;
    for (int n = threadIdx.x; n < N; n += blockDim.x) rows[row * N + n] = x[token * N + n];
}

extern "C" __global__ void scale_rows(const REAL *__restrict__ x, const int *__restrict__ pair_ids,
                                      const REAL *__restrict__ topk_weights, int N,
                                      REAL *__restrict__ rows) {
    const int64 row = blockIdx.x;
    const int pair = pair_ids[row];
    if (pair < 0) return;
    for (int n = threadIdx.x; n < N; n += blockDim.x)
        rows[row * N + n] = x[row * N + n] * topk_weights[pair];
}

extern "C" __global__ void spread_experts(const REAL *__restrict__ values,
                                          const int *__restrict__ pair_ids,
                                          const int *__restrict__ expert_offsets, int num_experts,
                                          int N, REAL *__restrict__ rows) {
    const int64 row = blockIdx.x;
    if (pair_ids[row] < 0) return;
    const int64 e = expert_of_row(expert_offsets, num_experts, row);
    for (int n = threadIdx.x; n < N; n += blockDim.x) rows[row * N + n] = values[e * N + n];
}

// (R, N) -> (T, N), slots in ascending order; topk_weights may be null.
extern "C" __global__ void combine_rows(const REAL *__restrict__ rows,
                                        const int *__restrict__ row_ids,
                                        const REAL *__restrict__ topk_weights, int N, int top_k,
                                        REAL *__restrict__ out) {
    const int64 token = blockIdx.x;
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
        REAL sum = 0;
        for (int64 p = token * top_k; p < (token + 1) * top_k; p++) {
            const int64 row = row_ids[p];
            if (row < 0) continue;
            const REAL value = rows[row * N + n];
            sum += topk_weights ? topk_weights[p] * value : value;
        }
        out[token * N + n] = sum;
    }
}

// <a, b> of the row of every route, 0 where it has none.
extern "C" __global__ void row_dot(const REAL *__restrict__ a, const REAL *__restrict__ b,
                                   const int *__restrict__ row_ids, int num_routes, int N,
                                   REAL *__restrict__ out) {
    const int64 p = (int64)blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (p >= num_routes) return;
    const int64 row = row_ids[p];
    REAL sum = 0;
    if (row >= 0)
        for (int i = lane; i < N; i += 32) sum += a[row * N + i] * b[row * N + i];
    sum = warp_sum(sum);
    if (lane == 0) out[p] = sum;
}

// Gradient of a route's weight: the dots of its tiles, and <grad_output, down_bias>.
extern "C" __global__ void finish_weights(const REAL *__restrict__ dots, int tiles,
                                          const REAL *__restrict__ grad_output,
                                          const REAL *__restrict__ bias,
                                          const int *__restrict__ row_ids,
                                          const int *__restrict__ expert_offsets, int num_experts,
                                          int num_routes, int top_k, int N,
                                          REAL *__restrict__ out) {
    const int64 p = (int64)blockIdx.x * WARPS + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (p >= num_routes) return;
    const int row = row_ids[p];
    REAL sum = 0;
    if (row >= 0) {
        for (int i = lane; i < tiles; i += 32) sum += dots[(int64)row * tiles + i];
        if (bias) {
            const REAL *of_expert = bias + (int64)expert_of_row(expert_offsets, num_experts, row) * N;
            const REAL *grad = grad_output + (int64)((int)p / top_k) * N;
            for (int i = lane; i < N; i += 32) sum += grad[i] * of_expert[i];
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) out[p] = sum;
}

// (R, N) -> (E, N), rows in ascending order. With topk_weights, rows are tokens' (T, N), weighted.
extern "C" __global__ void segment_sum(const OPERAND *__restrict__ rows,
                                       const int *__restrict__ pair_ids,
                                       const REAL *__restrict__ topk_weights,
                                       const int *__restrict__ expert_offsets, int top_k, int N,
                                       REAL *__restrict__ out, int accumulate) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.y;
    if (n >= N) return;
    REAL sum = 0;
    for (int64 row = expert_offsets[e]; row < expert_offsets[e + 1]; row++) {
        if (topk_weights) {
            const int pair = pair_ids[row];
            sum += topk_weights[pair] * REAL(widen(rows[(int64)(pair / top_k) * N + n]));
        } else {
            sum += REAL(widen(rows[row * N + n]));
        }
    }
    const int64 at = (int64)e * N + n;
    out[at] = accumulate ? out[at] + sum : sum;
}

extern "C" __global__ void activation(const REAL *__restrict__ gate_up, int I, int gated, int kind,
                                      REAL alpha, REAL before, REAL after, REAL clip, REAL shift,
                                      REAL *__restrict__ act) {
    const Curve curve = {kind, alpha, before, after, clip, shift};
    const int64 row = blockIdx.x;
    const REAL *g = gate_up + row * (gated ? 2 * I : I);
    for (int i = threadIdx.x; i < I; i += blockDim.x)
        act[row * I + i] = gated ? activate(curve, g[i], g[I + i]) : activate(curve, g[i]);
}

extern "C" __global__ void activation_backward(const REAL *__restrict__ grad_act,
                                               const REAL *__restrict__ gate_up, int I, int gated,
                                               int kind, REAL alpha, REAL before, REAL after,
                                               REAL clip, REAL shift,
                                               REAL *__restrict__ grad_gate_up) {
    const Curve curve = {kind, alpha, before, after, clip, shift};
    const int64 row = blockIdx.x, first = row * (gated ? 2 * I : I);
    for (int i = threadIdx.x; i < I; i += blockDim.x) {
        const REAL g = gate_up[first + i], grad = grad_act[row * I + i];
        const Back b = gated ? activate_back(curve, g, gate_up[first + I + i], grad)
                             : activate_back(curve, g, grad);
        grad_gate_up[first + i] = b.grad_gate;
        if (gated) grad_gate_up[first + I + i] = b.grad_up;
    }
}

#ifdef CAST_TO
extern "C" __global__ void cast(const WEIGHT *__restrict__ x, int64 size, CAST_TO *__restrict__ y) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) y[i] = narrow<CAST_TO>(widen(x[i]));
}
#endif
