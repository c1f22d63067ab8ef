// Grouped product over sorted_token_ids on tensor cores: float32 sums in ascending order of depth,
// one accumulator for each, so that a result does not depend on BLOCK_M.
//
// -D OPERAND (bfloat16, half16, float: rounded to tf32), WEIGHT (the same), EPILOGUE, GATED,
//    GATHER, TRANSPOSED, BLOCK_M (16, 64, 128), ALIGNED (panels.cuh; where GATED meets TRANSPOSED,
//    both halves of a row of weight begin at multiples of 16 bytes)
// Grid (blocks of entries, column tiles of 128); 64, 128 or 256 threads.
// Dynamic shared memory: max(256 * (BLOCK_M + 128), 544 * BLOCK_M) bytes.
//
// A warp owns 64 rows x 32 columns, or 16 x 64. Four stages of panels: three are under way while
// one is read; one barrier per stage says both that its copies have arrived and that the oldest is
// free.
#include "grouped.cuh"
#include "panels.cuh"

constexpr int WARP_M = BLOCK_M < 64 ? BLOCK_M : 64, WARP_N = BLOCK_M < 64 ? 64 : 32;
constexpr int ACROSS = COLUMNS / WARP_N, WARPS = BLOCK_M / WARP_M * ACROSS, THREADS = 32 * WARPS;
constexpr int PANEL_X = BLOCK_M * 64, STAGE = PANEL_X + COLUMNS * 64;
// Blocks that a multiprocessor should hold at least; loads of single elements need registers.
constexpr int RESIDENT = (BLOCK_M == 128 ? 2 : BLOCK_M == 64 ? 4 : 8) * (ALIGNED ? 4 : 3) / 4;

extern __shared__ __align__(128) unsigned char memory[];

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    grouped_gemm(GROUPED_ARGUMENTS) {
    __shared__ int routes[BLOCK_M];
    const int block = blockIdx.x, tile = blockIdx.y;
    if ((int64)block * BLOCK_M >= num_tokens_post_padded[0]) return;
    const int e = expert_ids[block];
    if (e < 0) return;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    sorted_token_ids += (int64)block * BLOCK_M;
    if (t < BLOCK_M) routes[t] = sorted_token_ids[t];

    // ACTIVATE_BACKWARD multiplies by (E, K, I): its N is that of y.
    const int columns = EPILOGUE == ACTIVATE_BACKWARD && GATED ? N / 2 : N;
    const WEIGHT *w = weight + (int64)e * columns * K;
    using Rows = DepthFirst<BLOCK_M, THREADS>;
    Rows rows(t);
#pragma unroll
    for (int i = 0; i < Rows::COUNT; i++) {
        int p = sorted_token_ids[rows.row + i * Rows::PASS];
        int source = p >= num_routes ? 0 : GATHER ? p / top_k : row_ids[p];
        rows.aim(i, x + (int64)source * K, K, p < num_routes);
    }
#if TRANSPOSED
    using Weights = DepthLast<THREADS>;
    Weights weights(t);
    const int n = column_of<COLUMNS>(tile, weights.column, columns);
    const int half = EPILOGUE == ACTIVATE && GATED ? columns / 2 : columns;
    const int width = n < 0 ? 0 : (n < half ? half : columns) - n;
    const char *from = advance(w + n, weights.first, columns * SIZE);
    const int64 pass = (int64)Weights::PASS * columns * SIZE;
    int left = K - weights.first;
#else
    using Weights = DepthFirst<COLUMNS, THREADS>;
    Weights weights(t);
#pragma unroll
    for (int i = 0; i < Weights::COUNT; i++) {
        int n = column_of<COLUMNS>(tile, weights.row + i * Weights::PASS, columns);
        weights.aim(i, n < 0 ? w : w + (int64)n * K, K, n >= 0);
    }
#endif
    auto copy_stage = [&](uint32 stage) {
        rows.copy(stage);
#if TRANSPOSED
#pragma unroll
        for (int i = 0; i < Weights::COUNT; i++) {
            weights.copy(stage + PANEL_X, i, from, i * Weights::PASS, left, width);
            from += pass;
        }
        left -= DEPTH;
#else
        weights.copy(stage + PANEL_X);
#endif
        commit_copies();
    };

    const uint32 base = shared_address(memory);
    const int warp_m = warp / ACROSS * WARP_M, warp_n = warp % ACROSS * WARP_N;
    const uint32 left_at = left_depth_first(lane, warp_m);
    const uint32 right_at =
        TRANSPOSED ? right_depth_last(lane, warp_n) : right_depth_first(lane, warp_n);
    float sums[WARP_M / 16][WARP_N / 8][4] = {};
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy_stage(base + s * STAGE);
    const int stages = (K + DEPTH - 1) / DEPTH;
    uint32 oldest = base + (STAGES - 1) * STAGE, current = base;
    int s = 0;
#pragma unroll 1
    do {
        wait_copies<STAGES - 2>();
        __syncthreads();
        copy_stage(oldest);  // Past the end: zeros.
#pragma unroll
        for (int step = 0; step < 2; step++) {
            Fragments<WARP_M / 16, WARP_N / 16> f;
            if constexpr (TRANSPOSED)
                load_right_depth_last(f.right, current + PANEL_X, right_at, step);
            else
                load_depth_first(f.right, current + PANEL_X, right_at, step);
            load_depth_first(f.left, current, left_at, step);
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
    finish_tile<COLUMNS, WARPS>(tile_sums, STRIDE_SUMS, routes, row_ids, num_routes, e, tile, warp,
                                lane, N, bias, topk_weights, y, act, grad_y, dots, gridDim.y,
                                Curve{kind, alpha, before, after, clip, shift});
}
