// What every grouped product over sorted_token_ids shares: its arguments, and what happens to a
// finished sum. A block of BLOCK_M entries of sorted_token_ids belongs to one expert; an entry is a
// route p = t * top_k + k, or at least num_routes where there is padding.
//
//   x       row row_ids[p], or with GATHER row p / top_k       (rows, K)
//   weight  (E, N, K), or with TRANSPOSED (E, K, N)
//   y       row row_ids[p] of
//     STORE               y = x W + bias                                        (R, N)
//     ROUTED              y = w_p (x W + bias)
//     ACTIVATE            y = x W + bias, if it is kept; act = f(y)             (R, N), (R, I)
//     ACTIVATE_BACKWARD   from s = x W (R, I), the gradient of w_p act, and y as it was kept:
//                         act = w_p f(y);  grad_y = w_p s f'(y);  dots = <s, f(y)> of each tile
// With GATED, N = 2 I in the last two: columns j and I + j make one activation.
#pragma once
#include "curves.cuh"

#define STORE 0
#define ROUTED 1
#define ACTIVATE 2
#define ACTIVATE_BACKWARD 3

#define GROUPED_ARGUMENTS                                                                          \
    const OPERAND *__restrict__ x, const WEIGHT *__restrict__ weight,                              \
        const int *__restrict__ sorted_token_ids, const int *__restrict__ expert_ids,              \
        const int *__restrict__ num_tokens_post_padded, const int *__restrict__ row_ids,           \
        int num_routes, int top_k, int N, int K, const REAL *__restrict__ bias,                    \
        const REAL *__restrict__ topk_weights, REAL *__restrict__ y, OPERAND *__restrict__ act,    \
        OPERAND *__restrict__ grad_y, REAL *__restrict__ dots, int kind, REAL alpha, REAL before,  \
        REAL after, REAL clip, REAL shift

// Global column of a tile's column c, or -1: with ACTIVATE and GATED half of a tile is gates.
template <int TILE_N>
DEVICE int column_of(int tile, int c, int columns) {
    int n = tile * TILE_N + c;
    if (EPILOGUE == ACTIVATE && GATED) {
        int j = tile * (TILE_N / 2) + c % (TILE_N / 2), I = columns / 2;
        return j >= I ? -1 : c < TILE_N / 2 ? j : I + j;
    }
    return n < columns ? n : -1;
}

// What becomes of a tile of finished sums (BLOCK_M, TILE_N) in shared memory, `stride` apart: a
// warp takes a row, so that neighbouring lanes write neighbouring numbers, and a row's dot has one
// order. All threads of the block come here; `routes` are the entries of the block.
template <int TILE_N, int WARPS>
DEVICE void finish_tile(const REAL *sums, int stride, const int *routes, const int *row_ids,
                        int num_routes, int e, int tile, int warp, int lane, int N,
                        const REAL *bias, const REAL *topk_weights, REAL *y, OPERAND *act,
                        OPERAND *grad_y, REAL *dots, int tiles, const Curve &curve) {
    const int I = GATED ? N / 2 : N;
    if (bias) bias += (int64)e * N;
    for (int r = warp; r < BLOCK_M; r += WARPS) {
        const int p = routes[r];
        if (p >= num_routes) continue;
        const int64 row = row_ids[p];
        const REAL *s = sums + r * stride;
        REAL dot = 0;
#pragma unroll 1
        for (int c = lane; c < (EPILOGUE == ACTIVATE && GATED ? TILE_N / 2 : TILE_N); c += 32) {
            const int n = column_of<TILE_N>(tile, c, EPILOGUE == ACTIVATE_BACKWARD ? I : N);
            if (n < 0) continue;
            REAL value = s[c] + (bias ? bias[n] : REAL(0));
            if (EPILOGUE == STORE || EPILOGUE == ROUTED) {
                y[row * N + n] = EPILOGUE == ROUTED ? topk_weights[p] * value : value;
            } else if (EPILOGUE == ACTIVATE) {
                if (y) y[row * N + n] = value;
                REAL result;
                if (GATED) {
                    REAL up = s[c + TILE_N / 2] + (bias ? bias[I + n] : REAL(0));
                    if (y) y[row * N + I + n] = up;
                    result = activate(curve, value, up);
                } else {
                    result = activate(curve, value);
                }
                act[row * I + n] = narrow<OPERAND>(result);
            } else {
                const REAL w = topk_weights[p], grad = w * s[c], g = y[row * N + n];
                Back b = GATED ? activate_back(curve, g, y[row * N + I + n], grad)
                               : activate_back(curve, g, grad);
                grad_y[row * N + n] = narrow<OPERAND>(b.grad_gate);
                if (GATED) grad_y[row * N + I + n] = narrow<OPERAND>(b.grad_up);
                act[row * I + n] = narrow<OPERAND>(w * b.act);
                dot += s[c] * b.act;
            }
        }
        if (EPILOGUE == ACTIVATE_BACKWARD) {
            dot = warp_sum(dot);
            if (lane == 0) dots[row * tiles + tile] = dot;
        }
    }
}
