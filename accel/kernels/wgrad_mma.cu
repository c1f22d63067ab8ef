// Weight gradients of the grouped product on tensor cores: of expert e,
//     out[e] = sum over its rows r of grad_y[r] x[r]^T        (E, M, N), float32
// in ascending order of rows; exactly zero for an expert without rows; with `accumulate`, added.
//
// -D OPERAND (bfloat16, half16, float: rounded to tf32), ALIGNED (panels.cuh),
//    GATHER (0 none; 1: x, 2: grad_y holds a row per token, not per route)
// Grid (column tiles of 128, row tiles of 128, experts), 256 threads.
// Dynamic shared memory: 69632 bytes.
//
// Rows are the depth of the product, and lie last in both panels. The pipeline is that of
// grouped_mma.cu; ids of routes are read a stage before the rows that they name.
#include "panels.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
using Panel = DepthLast<THREADS>;
constexpr int STAGE = 2 * Panel::BYTES;

extern __shared__ __align__(128) unsigned char memory[];

// p / d for 0 <= p < 2^31: `inverse` is (2^32 - 1) / d, and the estimate is at most 1 too low.
DEVICE int divide(int p, int d, uint32 inverse) {
    int q = __umulhi(p, inverse);
    return p - q * d >= d ? q + 1 : q;
}

extern "C" __global__ void __launch_bounds__(THREADS, ALIGNED ? 2 : 1)
    grouped_wgrad(const OPERAND *__restrict__ grad_y, const OPERAND *__restrict__ x,
                  const int *__restrict__ pair_ids, const int *__restrict__ expert_offsets,
                  int top_k, int M, int N, float *__restrict__ out, int accumulate) {
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, e = blockIdx.z;
    const int n0 = blockIdx.x * COLUMNS, m0 = blockIdx.y * COLUMNS;
    const int begin = expert_offsets[e], end = expert_offsets[e + 1];
    const uint32 inverse = GATHER ? 0xffffffffu / top_k : 0;

    Panel panel(t);
    const int width_m = M - m0 - panel.column, width_n = N - n0 - panel.column;
    const OPERAND *from_grad = grad_y + m0 + panel.column, *from_x = x + n0 + panel.column;
    int row = begin + panel.first, route[Panel::COUNT];
    auto read_routes = [&] {
#pragma unroll
        for (int i = 0; i < Panel::COUNT; i++) {
            int r = row + i * Panel::PASS;
            route[i] = GATHER && r < end ? pair_ids[r] : 0;
        }
    };
    auto copy_stage = [&](uint32 stage) {
#pragma unroll
        for (int i = 0; i < Panel::COUNT; i++) {
            int r = row + i * Panel::PASS, token = GATHER ? divide(route[i], top_k, inverse) : r;
            const char *grad_row = advance(from_grad, GATHER == 2 ? token : r, M * SIZE);
            const char *x_row = advance(from_x, GATHER == 1 ? token : r, N * SIZE);
            panel.copy(stage, i, grad_row, r, end, width_m);
            panel.copy(stage + Panel::BYTES, i, x_row, r, end, width_n);
        }
        commit_copies();
        row += DEPTH;
        read_routes();
    };

    const uint32 base = shared_address(memory);
    const int warp_m = warp / 4 * 64, warp_n = warp % 4 * 32;
    const uint32 left_at = left_depth_last(lane, warp_m), right_at = right_depth_last(lane, warp_n);
    float sums[4][4][4] = {};
    read_routes();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy_stage(base + s * STAGE);
    const int stages = (end - begin + DEPTH - 1) / DEPTH;
    uint32 oldest = base + (STAGES - 1) * STAGE, current = base;
    int s = 0;
#pragma unroll 1
    do {
        wait_copies<STAGES - 2>();
        __syncthreads();
        copy_stage(oldest);  // Past the end: zeros.
#pragma unroll
        for (int step = 0; step < 2; step++) {
            Fragments<4, 2> f;
            load_right_depth_last(f.right, current + Panel::BYTES, right_at, step);
            load_left_depth_last(f.left, current, left_at, step);
            multiply_fragments(sums, f);
        }
        oldest = current;
        current = current == base + (STAGES - 1) * STAGE ? base : current + STAGE;
    } while (++s < stages);
    wait_copies<0>();
    __syncthreads();

    float *tile_sums = (float *)memory;
    store_sums(sums, tile_sums + warp_m * STRIDE_SUMS + warp_n, lane);
    __syncthreads();
#pragma unroll 1
    for (int r = warp; r < COLUMNS && m0 + r < M; r += WARPS) {
        float *to = out + ((int64)e * M + m0 + r) * N + n0;
#pragma unroll
        for (int i = 0; i < COLUMNS / 32; i++) {
            int c = lane + 32 * i;
            float sum = tile_sums[r * STRIDE_SUMS + c];
            if (n0 + c < N) to[c] = accumulate ? to[c] + sum : sum;
        }
    }
}
