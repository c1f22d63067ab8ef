// ldmatrix, stmatrix, movmatrix and mma.sync on the fragments of a whole warp.
// mma products are summed in double and rounded once; tensor cores round in their own way.
#pragma once
#include "access.hpp"

namespace ptx {

// What `form` says of the matrix instructions; the translator writes the same numbers.
enum MatrixForm : u32 { COUNT_MASK = 7, TRANSPOSED = 8 };
enum MmaForm : u32 {
  MMA_K_MASK = 0xff, MMA_F16 = 0x100, MMA_BF16 = 0x200, MMA_TF32 = 0x400, MMA_F16_ACCUMULATE = 0x800
};

static inline Region* matrix_row(Thread& t, u64& address, u32 site, u32 access) {
  u32 space = SHARED;
  if (address >> SLOT_BITS) space = GENERIC;
  Region* r = find_region(t, space, address);
  check_bounds(t, r, address, 16, site, access, SHARED);
  return r;
}

static inline void note_matrix(Thread& t, u64 address, u32 count, u32 site) {
  u32 full = count >= 4 ? ~0u : (1u << (8 * count)) - 1;
  if (t.launch->traffic) machine(t).traffic.note(t.block->requests, t.warp, t.lane, full, site, SHARED, address, 16);
}

template <u32 N> PTX_INLINE u32 load_piece(Thread& t, Region& r, u64 address, u32 site) {
  u64 offset = address - r.base;
  check_full(t, r, r.state.data() + offset, offset, N, site, READ);
  check_races<N>(t, r, offset, site, READ, t.block->accessor(t), nullptr);
  return N == 4 ? get<u32>(r.data + offset) : get<u16>(r.data + offset);
}

// Each piece of a row is read for the thread that receives it.
static inline void ldmatrix(Block& b, u32 warp, u32 form) {
  u32 count = form & COUNT_MASK, site = b.lane(warp, 0)->wait_site;
  for (u32 m = 0; m < count; m++) {
    Region* row[8];
    u64 at[8];
    for (u32 i = 0; i < 8; i++) {
      Thread& giver = *b.lane(warp, m * 8 + i);
      at[i] = giver.in[0] | (u64)giver.in[1] << 32;
      row[i] = matrix_row(giver, at[i], site, READ);
      note_matrix(giver, at[i], count, site);
    }
    for (u32 l = 0; l < 32; l++) {
      Thread& t = *b.lane(warp, l);
      u32 g = l >> 2, q = l & 3;
      if (form & TRANSPOSED) {
        u32 low = load_piece<2>(t, *row[2 * q], at[2 * q] + 2 * g, site);
        t.out[m] = low | load_piece<2>(t, *row[2 * q + 1], at[2 * q + 1] + 2 * g, site) << 16;
      } else {
        t.out[m] = load_piece<4>(t, *row[g], at[g] + 4 * q, site);
      }
    }
  }
}

template <u32 N> PTX_INLINE void store_piece(Thread& t, Region& r, u64 address, u32 value, u32 site) {
  u64 offset = address - r.base;
  check_writable(t, r, offset, N, site, WRITE);
  check_races<N>(t, r, offset, site, WRITE, t.block->accessor(t), (const u8*)&value);
  memset(r.state.data() + offset, FULL, N);
  memcpy(r.data + offset, &value, N);
}

static inline void stmatrix(Block& b, u32 warp, u32 form) {
  u32 count = form & COUNT_MASK, site = b.lane(warp, 0)->wait_site;
  for (u32 m = 0; m < count; m++) {
    Region* row[8];
    u64 at[8];
    for (u32 i = 0; i < 8; i++) {
      Thread& giver = *b.lane(warp, m * 8 + i);
      at[i] = giver.in[0] | (u64)giver.in[1] << 32;
      row[i] = matrix_row(giver, at[i], site, WRITE);
      note_matrix(giver, at[i], count, site);
    }
    for (u32 l = 0; l < 32; l++) {
      Thread& t = *b.lane(warp, l);
      u32 g = l >> 2, q = l & 3, v = t.in[2 + m];
      if (form & TRANSPOSED) {
        store_piece<2>(t, *row[2 * q], at[2 * q] + 2 * g, v & 0xffff, site);
        store_piece<2>(t, *row[2 * q + 1], at[2 * q + 1] + 2 * g, v >> 16, site);
      } else {
        store_piece<4>(t, *row[g], at[g] + 4 * q, v, site);
      }
    }
  }
}

static inline void movmatrix(Block& b, u32 warp) {
  u16 m[8][8];
  for (u32 l = 0; l < 32; l++) {
    u32 v = b.lane(warp, l)->in[0];
    m[l >> 2][2 * (l & 3)] = (u16)v, m[l >> 2][2 * (l & 3) + 1] = (u16)(v >> 16);
  }
  for (u32 l = 0; l < 32; l++)
    b.lane(warp, l)->out[0] = pair(m[2 * (l & 3)][l >> 2], m[2 * (l & 3) + 1][l >> 2]);
}

static inline f64 element(u32 reg, u32 half, u32 form) {
  if (form & MMA_TF32) return bits<f32>(reg & 0xffffe000u);
  u16 h = (u16)(reg >> (16 * half));
  return form & MMA_BF16 ? bf16_value(h) : half_value(h);
}

// Operands of a thread: in[0..3] are A, in[4..5] B, in[6..9] C.
static inline void mma(Block& b, u32 warp, u32 form) {
  const u32 depth = form & MMA_K_MASK, tf32 = form & MMA_TF32;
  f64 a[16][16], columns[16][8], sum[16][8];
  for (u32 l = 0; l < 32; l++) {
    const u32* in = b.lane(warp, l)->in;
    u32 g = l >> 2, q = l & 3;
    if (tf32) {
      for (u32 i = 0; i < depth / 2; i++) a[g + 8 * (i & 1)][q + 4 * (i >> 1)] = element(in[i], 0, form);
      for (u32 i = 0; i < depth / 4; i++) columns[q + 4 * i][g] = element(in[4 + i], 0, form);
    } else {
      for (u32 i = 0; i < depth / 4; i++)
        for (u32 h = 0; h < 2; h++) a[g + 8 * (i & 1)][2 * q + 8 * (i >> 1) + h] = element(in[i], h, form);
      for (u32 i = 0; i < depth / 8; i++)
        for (u32 h = 0; h < 2; h++) columns[2 * q + 8 * i + h][g] = element(in[4 + i], h, form);
    }
  }
  for (u32 row = 0; row < 16; row++) {
    f64 total[8] = {0};  // k ascending for each of them; columns side by side, for the compiler to vectorise
    for (u32 k = 0; k < depth; k++)
      for (u32 column = 0; column < 8; column++) total[column] += a[row][k] * columns[k][column];
    memcpy(sum[row], total, sizeof total);
  }
  for (u32 l = 0; l < 32; l++) {
    Thread& t = *b.lane(warp, l);
    u32 g = l >> 2, q = l & 3;
    for (u32 i = 0; i < 4; i++) {
      f64 exact = sum[g + 8 * (i >> 1)][2 * q + (i & 1)];
      if (form & MMA_F16_ACCUMULATE) {
        u16 c = (u16)(t.in[6 + (i >> 1)] >> (16 * (i & 1))), d = encode_half(exact + half_value(c), RN);
        t.out[i >> 1] = i & 1 ? t.out[i >> 1] | (u32)d << 16 : d;
      } else {
        t.out[i] = bits<u32>(quiet((f32)(exact + bits<f32>(t.in[6 + i]))));
      }
    }
  }
}

}  // namespace ptx
