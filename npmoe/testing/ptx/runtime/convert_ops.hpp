// Conversions, and the half types: f16 and bf16 are held as their bits in 16 bit integers.
#pragma once
#include "float_ops.hpp"

namespace ptx {

// A double rounded to `mantissa` stored bits with least normal exponent `least`; overflow per mode.
f64 round_to(f64 x, s32 mantissa, s32 least, f64 largest, u32 mode);
u16 encode_half(f64 x, u32 mode);
u16 encode_bf16(f64 x, u32 mode);
f32 encode_tf32(f32 x, u32 mode);
f64 round_to_odd_fma(f64 a, f64 b, f64 c);

PTX_INLINE f32 half_value(u16 h) {
  u32 sign = (u32)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return bits<f32>(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return bits<f32>(sign | (exponent + 112) << 23 | mantissa << 13);
  f32 small = (f32)mantissa * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
}
PTX_INLINE f32 bf16_value(u16 b) { return bits<f32>((u32)b << 16); }

struct Half {
  PTX_INLINE f32 value(u16 h) { return half_value(h); }
  PTX_INLINE u16 encode(f64 x, u32 mode = RN) { return encode_half(x, mode); }
  enum { SIGN = 0x8000, INF = 0x7c00, ONE = 0x3c00, NAN_ = 0x7fff, LEAST = 0x0400 };
};
struct Bf16 {
  PTX_INLINE f32 value(u16 h) { return bf16_value(h); }
  PTX_INLINE u16 encode(f64 x, u32 mode = RN) { return encode_bf16(x, mode); }
  enum { SIGN = 0x8000, INF = 0x7f80, ONE = 0x3f80, NAN_ = 0x7fff, LEAST = 0x0080 };
};

template <class H, bool FTZ> PTX_INLINE u16 hflush(u16 h) {
  return FTZ && (h & 0x7fff) < H::LEAST ? (u16)(h & 0x8000) : h;
}
template <class H, bool FTZ, bool SAT, bool RELU> PTX_INLINE u16 hfinish(u16 h) {
  bool nan_ = (h & 0x7fff) > H::INF;
  if (SAT) return nan_ || (h & 0x8000) ? 0 : h > H::ONE ? (u16)H::ONE : hflush<H, FTZ>(h);
  if (RELU) return nan_ ? (u16)H::NAN_ : (h & 0x8000) ? 0 : hflush<H, FTZ>(h);
  return hflush<H, FTZ>(h);
}
#define PTX_HALF template <class H, bool FTZ, bool SAT, bool RELU> PTX_INLINE u16
#define PTX_HV(x) H::value(hflush<H, FTZ>(x))
// The sum and product of two half values rounded to f32 first round to the same half.
PTX_HALF hadd(u16 a, u16 b) { return hfinish<H, FTZ, SAT, RELU>(H::encode(PTX_HV(a) + PTX_HV(b))); }
PTX_HALF hsub(u16 a, u16 b) { return hfinish<H, FTZ, SAT, RELU>(H::encode(PTX_HV(a) - PTX_HV(b))); }
PTX_HALF hmul(u16 a, u16 b) { return hfinish<H, FTZ, SAT, RELU>(H::encode(PTX_HV(a) * PTX_HV(b))); }
PTX_HALF hfma(u16 a, u16 b, u16 c) {
  return hfinish<H, FTZ, SAT, RELU>(H::encode(round_to_odd_fma(PTX_HV(a), PTX_HV(b), PTX_HV(c))));
}
template <class H, bool FTZ, bool NAN_> PTX_INLINE u16 hmin(u16 a, u16 b) {
  a = hflush<H, FTZ>(a), b = hflush<H, FTZ>(b);
  bool an = (a & 0x7fff) > H::INF, bn = (b & 0x7fff) > H::INF;
  if (an || bn) return NAN_ || (an && bn) ? (u16)H::NAN_ : an ? b : a;
  f32 x = H::value(a), y = H::value(b);
  return x == y ? (a & 0x8000 ? a : b) : x < y ? a : b;
}
template <class H, bool FTZ, bool NAN_> PTX_INLINE u16 hmax(u16 a, u16 b) {
  a = hflush<H, FTZ>(a), b = hflush<H, FTZ>(b);
  bool an = (a & 0x7fff) > H::INF, bn = (b & 0x7fff) > H::INF;
  if (an || bn) return NAN_ || (an && bn) ? (u16)H::NAN_ : an ? b : a;
  f32 x = H::value(a), y = H::value(b);
  return x == y ? (a & 0x8000 ? b : a) : x < y ? b : a;
}
PTX_INLINE u16 hneg(u16 a) { return (u16)(a ^ 0x8000); }
PTX_INLINE u16 habs(u16 a) { return (u16)(a & 0x7fff); }
template <class H> PTX_INLINE u16 happrox(u32 function, u16 a) { return H::encode(approximate(function, H::value(a))); }

PTX_INLINE u32 pair(u16 low, u16 high) { return (u32)high << 16 | low; }
PTX_INLINE u16 low_half(u32 v) { return (u16)v; }
PTX_INLINE u16 high_half(u32 v) { return (u16)(v >> 16); }

// float -> integer: round, then clamp; NaN as the manual's table says.
f64 round_integer(f64 x, u32 mode);
template <class I, bool FROM_F64> PTX_INLINE I to_integer(f64 x, u32 mode) {
  const bool is_signed = (I)-1 < 0;
  const u32 width = 8 * sizeof(I);
  if (x != x) return FROM_F64 || width == 64 ? (I)((u64)1 << (width - 1)) : (I)0;
  f64 r = round_integer(x, mode);
  f64 above = is_signed ? (f64)((u64)1 << (width - 1)) : (f64)((u64)1 << (width - 1)) * 2;
  if (r >= above) return is_signed ? (I)(((u64)1 << (width - 1)) - 1) : (I)~(I)0;
  if (r < (is_signed ? -above : 0)) return is_signed ? (I)((u64)1 << (width - 1)) : (I)0;
  return (I)r;
}
// integer -> integer with .sat: clamp to the range of I.
template <class I, class From> PTX_INLINE I clamp_integer(From v) {
  const bool is_signed = (I)-1 < 0;
  s128 top = is_signed ? ((s128)1 << (8 * sizeof(I) - 1)) - 1 : ((s128)1 << (8 * sizeof(I))) - 1;
  s128 bottom = is_signed ? -top - 1 : 0, x = (s128)v;
  return (I)(x < bottom ? bottom : x > top ? top : x);
}
f32 integer_to_f32(s64 v, bool is_unsigned, u32 mode);
f64 integer_to_f64(s64 v, bool is_unsigned, u32 mode);
f32 f64_to_f32(f64 v, u32 mode);

}  // namespace ptx
