// Grouped product over sorted_token_ids on ordinary cores: every sum in REAL, in ascending order.
//
// -D REAL, WEIGHT, EPILOGUE, GATED, GATHER, TRANSPOSED, BLOCK_M (16, 64)
// Grid (blocks of entries, column tiles), 256 threads, no dynamic shared memory.
//
// A tile is BLOCK_M rows x 64 columns; a thread owns BLOCK_M / 16 rows and 4 columns, 16 apart.
#include "grouped.cuh"

#define TILE_N 64
#define DEPTH 16
#define ROWS (BLOCK_M / 16)
#define STRIDE_X (BLOCK_M + 1)
#define STRIDE_W (TILE_N + 1)
#define PANELS (DEPTH * (STRIDE_X + STRIDE_W))
#define SUMS (BLOCK_M * STRIDE_W)

extern "C" __global__ void __launch_bounds__(256, 3) grouped_gemm(GROUPED_ARGUMENTS) {
    __shared__ REAL scratch[PANELS > SUMS ? PANELS : SUMS];
    __shared__ int routes[BLOCK_M], sources[BLOCK_M];
    REAL *xs = scratch, *ws = scratch + DEPTH * STRIDE_X;
    const int block = blockIdx.x, tile = blockIdx.y;
    if ((int64)block * BLOCK_M >= num_tokens_post_padded[0]) return;
    const int e = expert_ids[block];
    if (e < 0) return;
    const uint32 t = threadIdx.x, tx = t % 16, ty = t / 16;
    __builtin_assume(t < 256);
    if (t < BLOCK_M) {
        int p = sorted_token_ids[(int64)block * BLOCK_M + t];
        routes[t] = p;
        sources[t] = p >= num_routes ? -1 : GATHER ? p / top_k : row_ids[p];
    }
    __syncthreads();

    // ACTIVATE_BACKWARD multiplies by (E, K, I): its N is that of y.
    const int columns = EPILOGUE == ACTIVATE_BACKWARD && GATED ? N / 2 : N;
    const WEIGHT *w = weight + (int64)e * columns * K;
    REAL sums[ROWS][4] = {};
    for (int k0 = 0; k0 < K; k0 += DEPTH) {
#pragma unroll
        for (int j = 0; j < ROWS; j++) {
            const int k = tx, r = ty + 16 * j, source = sources[r];
            const bool inside = source >= 0 && k0 + k < K;
            xs[k * STRIDE_X + r] = inside ? x[(int64)source * K + k0 + k] : REAL(0);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            // Neighbouring threads read neighbouring numbers of either layout.
            const int k = TRANSPOSED ? t / TILE_N + 4 * j : tx;
            const int c = TRANSPOSED ? t % TILE_N : ty + 16 * j;
            const int n = column_of<TILE_N>(tile, c, columns);
            const int64 at = TRANSPOSED ? (int64)(k0 + k) * columns + n : (int64)n * K + k0 + k;
            ws[k * STRIDE_W + c] = n >= 0 && k0 + k < K ? REAL(widen(w[at])) : REAL(0);
        }
        __syncthreads();
#pragma unroll 4
        for (int k = 0; k < DEPTH; k++) {
            REAL a[ROWS], b[4];
            for (int r = 0; r < ROWS; r++) a[r] = xs[k * STRIDE_X + ty + 16 * r];
            for (int c = 0; c < 4; c++) b[c] = ws[k * STRIDE_W + tx + 16 * c];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < 4; c++) sums[r][c] += a[r] * b[c];
        }
        __syncthreads();
    }
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 4; c++) scratch[(ty + 16 * r) * STRIDE_W + tx + 16 * c] = sums[r][c];
    __syncthreads();
    finish_tile<TILE_N, 8>(scratch, STRIDE_W, routes, row_ids, num_routes, e, tile, t / 32, t % 32,
                           N, bias, topk_weights, y, act, grad_y, dots, gridDim.y,
                           Curve{kind, alpha, before, after, clip, shift});
}
