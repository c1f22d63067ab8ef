// From chosen experts to rows in expert order, and to blocks of one expert each: a counting sort in
// three passes, stable and without atomics on anything whose order could show.
//
//   count_routes   how many routes of each chunk of CHUNK each expert has       grid chunks, 256
//   scan_experts   where each expert's, and each chunk's, first row is          grid 1, 1024
//   place_routes   pair_ids, token_ids (R, then -1), row_ids                    grid chunks, 32
//   scan_blocks    first block of every expert                                  grid 1, 1024
//   fill_blocks    sorted_token_ids, expert_ids                                 grid entries/256, 256
//
// topk_ids [2 0 | 2 1 | 0 2], 4 experts -> pair_ids [1 4 3 0 2 5], expert_offsets [0 2 3 6 6];
// blocks of 4: sorted_token_ids [1 4 6 6 | 3 6 6 6 | 0 2 5 6], expert_ids [0 1 2].
#include "scalars.cuh"

#define CHUNK 512

// The expert of a route: its id, or the map's number for it; -1 if it has no row.
DEVICE int expert_of(const int *topk_ids, const int *expert_map, uint32 p, int num_ids) {
    int id = topk_ids[p];
    if (id < 0 || id >= num_ids) return -1;
    return expert_map ? expert_map[id] : id;
}

// Ids must lie in -1..num_legal-1 (identity experts have ids beyond num_ids and no row).
extern "C" __global__ void __launch_bounds__(256)
    count_routes(const int *__restrict__ topk_ids, const int *__restrict__ expert_map,
                 int num_routes, int num_ids, int num_legal, int num_experts,
                 int *__restrict__ counts, int *__restrict__ illegal) {
    extern __shared__ int found[];  // (num_experts,)
    for (int e = threadIdx.x; e < num_experts; e += 256) found[e] = 0;
    __syncthreads();
    for (int i = 0; i < CHUNK; i += 256) {
        const uint32 p = blockIdx.x * CHUNK + i + threadIdx.x;
        if (p >= num_routes) break;
        int id = topk_ids[p], e = expert_of(topk_ids, expert_map, p, num_ids);
        if (e >= 0) atomicAdd(&found[e], 1);
        if (id < -1 || id >= num_legal) atomicExch(illegal, 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += 256)
        counts[(int64)blockIdx.x * num_experts + e] = found[e];
}

// The sum of what lanes up to this one bring.
DEVICE int scan_warp(int value) {
    const int lane = threadIdx.x % 32;
    for (int step = 1; step < 32; step *= 2) {
        int below = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += below;
    }
    return value;
}

// The sum of what lower threads of the block, of 32 warps, bring; `total` is that of all.
DEVICE int scan_block(int value, int *warps, int &total) {
    const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int upto = scan_warp(value);
    if (lane == 31) warps[warp] = upto;
    __syncthreads();
    const int own = warps[warp], sums = scan_warp(warps[lane]);
    total = __shfl_sync(0xffffffffu, sums, 31);
    const int before = __shfl_sync(0xffffffffu, sums, warp) - own;
    __syncthreads();
    return before + upto - value;
}

extern "C" __global__ void __launch_bounds__(1024)
    scan_experts(int *__restrict__ counts, int chunks, int num_experts,
                 int *__restrict__ expert_offsets) {
    __shared__ int warps[32];
    int begin = 0, total;
#pragma unroll 1
    for (int first = 0; first < num_experts; first += 1024) {
        int e = first + threadIdx.x, routes = 0;
        if (e < num_experts)
            for (int c = 0; c < chunks; c++) {
                int64 at = (int64)c * num_experts + e;
                int here = counts[at];
                counts[at] = routes;  // now: routes of this expert in earlier chunks
                routes += here;
            }
        int before = scan_block(routes, warps, total);
        if (e < num_experts) expert_offsets[e] = begin + before;
        begin += total;
    }
    if (threadIdx.x == 0) expert_offsets[num_experts] = begin;
}

extern "C" __global__ void __launch_bounds__(32)
    place_routes(const int *__restrict__ topk_ids, const int *__restrict__ expert_map,
                 int num_routes, int num_ids, int num_experts, int top_k,
                 const int *__restrict__ expert_offsets, int *__restrict__ counts,
                 int *__restrict__ pair_ids, int *__restrict__ token_ids,
                 int *__restrict__ row_ids) {
    const int lane = threadIdx.x, num_rows = expert_offsets[num_experts];
    int *next = counts + (int64)blockIdx.x * num_experts;
    for (int i = 0; i < CHUNK; i += 32) {
        const uint32 p = blockIdx.x * CHUNK + i + lane;
        const bool is_route = p < num_routes;
        const int e = is_route ? expert_of(topk_ids, expert_map, p, num_ids) : -1;
        const uint32 same = __match_any_sync(0xffffffffu, e);
        const int rank = __popc(same & ((1u << lane) - 1));
        if (e >= 0) {
            int row = expert_offsets[e] + next[e] + rank;
            pair_ids[row] = p;
            token_ids[row] = p / top_k;
            row_ids[p] = row;
        } else if (is_route) {
            row_ids[p] = -1;
        }
        if (is_route && p >= num_rows) pair_ids[p] = token_ids[p] = -1;
        __syncwarp();  // everybody has read `next`
        if (e >= 0 && rank == 0) next[e] += __popc(same);
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    scan_blocks(const int *__restrict__ expert_offsets, int num_experts, int block_size,
                int *__restrict__ block_offsets, int *__restrict__ num_tokens_post_padded) {
    __shared__ int warps[32];
    int begin = 0, total;
#pragma unroll 1
    for (int first = 0; first < num_experts; first += 1024) {
        int e = first + threadIdx.x, blocks = 0;
        if (e < num_experts)
            blocks = (expert_offsets[e + 1] - expert_offsets[e] + block_size - 1) / block_size;
        int before = scan_block(blocks, warps, total);
        if (e < num_experts) block_offsets[e] = begin + before;
        begin += total;
    }
    if (threadIdx.x == 0) {
        block_offsets[num_experts] = begin;
        num_tokens_post_padded[0] = begin * block_size;
    }
}

// `labels` names the experts otherwise (-1: of another rank); behind the last block it is -1.
extern "C" __global__ void __launch_bounds__(256)
    fill_blocks(const int *__restrict__ pair_ids, const int *__restrict__ expert_offsets,
                const int *__restrict__ block_offsets, const int *__restrict__ labels,
                int num_experts, int block_size, int num_routes, int entries, int blocks,
                int *__restrict__ sorted_token_ids, int *__restrict__ expert_ids) {
    const uint32 i = blockIdx.x * 256 + threadIdx.x;
    const int b = i / (uint32)block_size, at = i % (uint32)block_size;
    if (b >= blocks) return;
    int e = -1, entry = num_routes;
    if (b < block_offsets[num_experts]) {
        int low = 0, high = num_experts - 1;  // the last expert whose first block is at most b
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (block_offsets[middle] <= b) low = middle;
            else high = middle - 1;
        }
        e = low;
        int row = expert_offsets[e] + (b - block_offsets[e]) * block_size + at;
        if (row < expert_offsets[e + 1]) entry = pair_ids[row];
    }
    if (i < entries) sorted_token_ids[i] = entry;
    if (at == 0) expert_ids[b] = e >= 0 && labels ? labels[e] : e;
}
