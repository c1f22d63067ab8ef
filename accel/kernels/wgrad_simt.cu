// Weight gradients of the grouped product on ordinary cores: of expert e,
//     out[e] = sum over its rows r of grad_y[r] x[r]^T        (E, M, N)
// in ascending order of rows; exactly zero for an expert without rows; with `accumulate`, added.
//
// -D REAL, GATHER (0 none; 1: x, 2: grad_y holds a row per token, not per route)
// Grid (column tiles, row tiles, experts), 256 threads.
#include "scalars.cuh"

#define TILE 64
#define DEPTH 16

extern "C" __global__ void __launch_bounds__(256, 3)
    grouped_wgrad(const REAL *__restrict__ grad_y, const REAL *__restrict__ x,
                  const int *__restrict__ pair_ids, const int *__restrict__ expert_offsets,
                  int top_k, int M, int N, REAL *__restrict__ out, int accumulate) {
    __shared__ REAL gs[DEPTH][TILE + 1], xs[DEPTH][TILE + 1];
    const uint32 t = threadIdx.x, tx = t % 16, ty = t / 16;
    __builtin_assume(t < 256);
    const int e = blockIdx.z;
    const int n0 = blockIdx.x * TILE, m0 = blockIdx.y * TILE;
    const int begin = expert_offsets[e], end = expert_offsets[e + 1];

    REAL sums[4][4] = {};
    for (int r0 = begin; r0 < end; r0 += DEPTH) {
#pragma unroll
        for (int j = 0; j < DEPTH * TILE / 256; j++) {
            const int d = t / TILE + 4 * j, c = t % TILE, r = r0 + d;
            int token = GATHER && r < end ? pair_ids[r] / top_k : r;
            int64 gr = GATHER == 2 ? token : r, xr = GATHER == 1 ? token : r;
            gs[d][c] = r < end && m0 + c < M ? grad_y[gr * M + m0 + c] : REAL(0);
            xs[d][c] = r < end && n0 + c < N ? x[xr * N + n0 + c] : REAL(0);
        }
        __syncthreads();
        for (int d = 0; d < DEPTH; d++) {
            REAL a[4], b[4];
            for (int i = 0; i < 4; i++) a[i] = gs[d][ty + 16 * i], b[i] = xs[d][tx + 16 * i];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) sums[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int m = m0 + ty + 16 * i, n = n0 + tx + 16 * j;
            if (m >= M || n >= N) continue;
            int64 at = ((int64)e * M + m) * N + n;
            out[at] = accumulate ? out[at] + sums[i][j] : sums[i][j];
        }
}
