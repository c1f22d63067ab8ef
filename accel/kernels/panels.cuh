// Panels of operands in shared memory: how they are filled, and how fragments are read from them.
//
// A stage of the pipeline holds 64 bytes of depth of both operands: DEPTH elements, two steps of
// mma. A panel is made of chunks of 16 bytes, which lie
//   depth first    as rows, chunks 0..3 of their depth
//   depth last     as depths, chunks of their 128 columns
// with the number of a chunk xored so that copies, ldmatrix and the plain loads of tf32 touch each
// bank once.
//
// -D ALIGNED: 1 if rows of both operands begin at multiples of 16 bytes and hold whole chunks.
#pragma once
#include "mma.cuh"

constexpr int SIZE = sizeof(OPERAND), DEPTH = 64 / SIZE, CHUNK = 16 / SIZE;
constexpr int STAGES = 4, COLUMNS = 128, STRIDE_SUMS = COLUMNS + 8;
constexpr bool HALF = SIZE == 2;

// Where a chunk lies in a panel.
DEVICE constexpr uint32 depth_first(int row, int c) { return row * 64 + ((c ^ row / 2 % 4) << 4); }
DEVICE constexpr uint32 depth_last(int k, int c) {
    return k * COLUMNS * SIZE + ((c ^ (HALF ? k % 8 : k % 4 * 2)) << 4);
}

// A chunk of which the elements from `limit` on, counted from `at`, are zeros. `turn` spreads
// copies of single elements over the banks.
DEVICE void copy_chunk(uint32 to, const char *from, int at, int limit, int turn) {
    if constexpr (ALIGNED) {
        copy_async_16(to, from, at, limit);
    } else if constexpr (HALF) {
        uint32 v[4];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            uint32 bits = load_2(from + 2 * j, at + j, limit);
            v[j / 2] = j % 2 ? v[j / 2] | bits << 16 : bits;
        }
        store_shared_16(to, v);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int element = (turn + j) % 4;
            copy_async_4(to + 4 * element, from + 4 * element, at + element, limit);
        }
    }
}

// What a thread copies of a panel of ROWS rows with the depth first: its chunk of every PASSth row.
template <int ROWS, int THREADS>
struct DepthFirst {
    static constexpr int PASS = THREADS / 4, COUNT = ROWS / PASS;
    static_assert(ROWS % PASS == 0, "every thread copies as much");
    const OPERAND *from[COUNT];
    int row, limit[COUNT], at, turn;
    uint32 to;

    __device__ __forceinline__ DepthFirst(int t) : row(t / 4) {
        int c = t % 4;
        turn = row / 2 % 4;
        at = c * CHUNK;
        to = depth_first(row, c);
    }
    // Row `row + i * PASS` lies in `data`; or else it is zeros.
    __device__ __forceinline__ void aim(int i, const OPERAND *data, int depth, bool inside) {
        from[i] = data;
        limit[i] = inside ? depth : 0;
    }
    __device__ __forceinline__ void copy(uint32 panel) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            copy_chunk(panel + to + i * PASS * 64, advance(from[i], at, SIZE), at, limit[i], turn);
        at += DEPTH;
    }
};

// What a thread copies of a panel of 128 columns with the depth last: its chunk of every PASSth
// depth.
template <int THREADS>
struct DepthLast {
    static constexpr int CHUNKS = COLUMNS / CHUNK, PASS = THREADS / CHUNKS, COUNT = DEPTH / PASS;
    static constexpr int BYTES = DEPTH * COLUMNS * SIZE;
    int column, first, turn;
    uint32 to;

    __device__ __forceinline__ DepthLast(int t) {
        int c = t % CHUNKS, k = t / CHUNKS;
        column = c * CHUNK;
        first = k;
        turn = c / 8;
        to = depth_last(k, c);
    }
    // Depth `at`, of `depth`, begins for this thread at `from`, and has `width` columns.
    __device__ __forceinline__ void copy(uint32 panel, int i, const char *from, int at, int depth,
                                         int width) {
        // first < PASS, a power of two: the two depths have no bit in common.
        panel += (to ^ depth_last(i * PASS, 0) % 128) + i * PASS * COLUMNS * SIZE;
        if constexpr (ALIGNED)
            copy_chunk(panel, from, at, width > 0 ? depth : 0, turn);
        else
            copy_chunk(panel, from, 0, at < depth ? width : 0, turn);
    }
};

// A warp's fragments for one step of depth, half a stage: ROWS times 16 rows on the left, PAIRS
// times 16 columns on the right. A lane's offset in a panel is made before the loop.
template <int ROWS, int PAIRS>
struct Fragments {
    uint32 left[ROWS][4], right[PAIRS][4];
};

DEVICE uint32 left_depth_first(int lane, int first) {
    return first * 64 + depth_first(lane % 16, lane / 16);
}
DEVICE uint32 right_depth_first(int lane, int first) {
    return first * 64 + depth_first(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
template <int COUNT>
DEVICE void load_depth_first(uint32 (&v)[COUNT][4], uint32 panel, uint32 offset, int step) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) load_matrices(v[i], panel + (offset ^ step * 32) + i * 1024);
}

// `first` is a multiple of 32.
DEVICE uint32 left_depth_last(int lane, int first) {
    return HALF ? depth_last(lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2)
                : depth_last(lane % 4, (first + lane / 4) / 4) + lane / 4 % 4 * 4;
}
DEVICE uint32 right_depth_last(int lane, int first) {
    return HALF ? depth_last(lane % 16, first / 8 + lane / 16) : left_depth_last(lane, first);
}
// Where eight columns lie that are `eight` times 8 further on.
DEVICE uint32 shift_eights(uint32 offset, int eight) {
    return (offset ^ eight * 8 * SIZE % 128) + eight * 8 * SIZE / 128 * 128;
}
template <int COUNT>
DEVICE void load_left_depth_last(uint32 (&v)[COUNT][4], uint32 panel, uint32 offset, int step) {
    panel += step * 4096;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if constexpr (HALF) {
            load_matrices_transposed(v[i], panel + shift_eights(offset, 2 * i));
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[i][j] = load_shared_4(panel + shift_eights(offset, 2 * i + j % 2) + j / 2 * 2048);
        }
    }
}
template <int COUNT>
DEVICE void load_right_depth_last(uint32 (&v)[COUNT][4], uint32 panel, uint32 offset, int step) {
    panel += step * 4096;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if constexpr (HALF) {
            load_matrices_transposed(v[i], panel + shift_eights(offset, 2 * i));
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
                v[i][j] = load_shared_4(panel + shift_eights(offset, 2 * i + j / 2) + j % 2 * 2048);
        }
    }
}

// sums += left right^T.
template <int ROWS, int PAIRS>
DEVICE void multiply_fragments(float (&sums)[ROWS][2 * PAIRS][4], Fragments<ROWS, PAIRS> &f) {
    if constexpr (!HALF) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) round_tf32(f.left[i][j]);
#pragma unroll
            for (int i = 0; i < PAIRS; i++) round_tf32(f.right[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < 2 * PAIRS; j++)
            multiply_add(sums[i][j], f.left[i], f.right[j / 2][j % 2 * 2],
                         f.right[j / 2][j % 2 * 2 + 1], OPERAND());
}

// A warp's sums into a tile in shared memory, STRIDE_SUMS apart.
template <int ROWS, int EIGHTS>
DEVICE void store_sums(const float (&sums)[ROWS][EIGHTS][4], float *tile, int lane) {
    float *to = tile + lane / 4 * STRIDE_SUMS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                *(float2 *)(to + (i * 16 + h * 8) * STRIDE_SUMS + j * 8) =
                    make_float2(sums[i][j][2 * h], sums[i][j][2 * h + 1]);
}
