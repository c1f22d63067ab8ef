// f32 and f64 instructions. Round to nearest even unless a mode is named; contraction is off.
// Approximate instructions are evaluated in double and rounded once: hardware may differ by the
// error that the PTX manual grants it.
#pragma once
#include "scalars.hpp"

namespace ptx {

enum Rounding { RN = 0, RZ = 1, RM = 2, RP = 3, RNA = 4 };

// Directed rounding, and everything that needs libm, lives in the runtime's own object file.
f64 rounded_op(u32 op, u32 mode, f64 a, f64 b, f64 c);
f32 rounded_op(u32 op, u32 mode, f32 a, f32 b, f32 c);
enum RoundedOp { OP_ADD, OP_SUB, OP_MUL, OP_FMA, OP_DIV, OP_SQRT, OP_RCP };
f64 approximate(u32 function, f64 x);
enum Approximate { FN_EX2, FN_LG2, FN_SIN, FN_COS, FN_TANH, FN_RSQRT };

template <bool FTZ> PTX_INLINE f32 flush(f32 x) {
  if (!FTZ) return x;
  u32 v = bits<u32>(x);
  return (v & 0x7f800000u) ? x : bits<f32>(v & 0x80000000u);
}
template <bool FTZ> PTX_INLINE f64 flush(f64 x) { return x; }

PTX_INLINE f32 quiet(f32 x) { return x != x ? bits<f32>(0x7fffffffu) : x; }
PTX_INLINE f64 quiet(f64 x) { return x; }

template <class F, bool FTZ, bool SAT> PTX_INLINE F finish(F x) {
  x = flush<FTZ>(quiet(x));
  if (SAT) x = x > 0 ? (x < 1 ? x : (F)1) : (F)0;  // NaN becomes +0
  return x;
}

#define PTX_FLOAT template <class F, u32 MODE, bool FTZ, bool SAT> PTX_INLINE F
PTX_FLOAT fadd(F a, F b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  return finish<F, FTZ, SAT>(MODE == RN ? a + b : rounded_op(OP_ADD, MODE, a, b, (F)0));
}
PTX_FLOAT fsub(F a, F b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  return finish<F, FTZ, SAT>(MODE == RN ? a - b : rounded_op(OP_SUB, MODE, a, b, (F)0));
}
PTX_FLOAT fmul(F a, F b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  return finish<F, FTZ, SAT>(MODE == RN ? a * b : rounded_op(OP_MUL, MODE, a, b, (F)0));
}
PTX_INLINE f32 fma_rn(f32 a, f32 b, f32 c) { return __builtin_fmaf(a, b, c); }
PTX_INLINE f64 fma_rn(f64 a, f64 b, f64 c) { return __builtin_fma(a, b, c); }
PTX_FLOAT ffma(F a, F b, F c) {
  a = flush<FTZ>(a), b = flush<FTZ>(b), c = flush<FTZ>(c);
  return finish<F, FTZ, SAT>(MODE == RN ? fma_rn(a, b, c) : rounded_op(OP_FMA, MODE, a, b, c));
}
PTX_FLOAT fdiv(F a, F b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  return finish<F, FTZ, SAT>(MODE == RN ? a / b : rounded_op(OP_DIV, MODE, a, b, (F)0));
}
PTX_FLOAT frcp(F a) {
  a = flush<FTZ>(a);
  return finish<F, FTZ, SAT>(MODE == RN ? (F)1 / a : rounded_op(OP_RCP, MODE, a, (F)0, (F)0));
}
PTX_FLOAT fsqrt(F a) {
  a = flush<FTZ>(a);
  return finish<F, FTZ, SAT>(rounded_op(OP_SQRT, MODE, a, (F)0, (F)0));
}
// div.approx.f32 returns 0 for 2^126 < |b| < 2^128, as the manual says.
template <bool FTZ> PTX_INLINE f32 fdiv_approx(f32 a, f32 b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  f32 size = b < 0 ? -b : b;
  if (size > 8.507059173023462e37f && size < __builtin_inff() && a - a == 0)
    return bits<f32>((bits<u32>(a) ^ bits<u32>(b)) & 0x80000000u);
  return finish<f32, FTZ, false>(a / b);
}
template <class F, bool FTZ> PTX_INLINE F approx(u32 function, F a) {
  return finish<F, FTZ, false>((F)approximate(function, (f64)flush<FTZ>(a)));
}

template <class F, bool FTZ, bool NAN_, bool XORSIGN> PTX_INLINE F fmin_(F a, F b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  F nan_ = (F)__builtin_nan("");
  if (a != a || b != b) return quiet((NAN_ || (a != a && b != b)) ? nan_ : (a != a ? b : a));
  if (a == b) return __builtin_signbit(a) ? a : b;  // -0 < +0
  return a < b ? a : b;
}
template <class F, bool FTZ, bool NAN_, bool XORSIGN> PTX_INLINE F fmax_(F a, F b) {
  a = flush<FTZ>(a), b = flush<FTZ>(b);
  F nan_ = (F)__builtin_nan("");
  if (a != a || b != b) return quiet((NAN_ || (a != a && b != b)) ? nan_ : (a != a ? b : a));
  if (a == b) return __builtin_signbit(a) ? b : a;
  return a < b ? b : a;
}
PTX_INLINE f32 fneg(f32 a) { return bits<f32>(bits<u32>(a) ^ 0x80000000u); }
PTX_INLINE f64 fneg(f64 a) { return bits<f64>(bits<u64>(a) ^ (1ull << 63)); }
PTX_INLINE f32 fabs_(f32 a) { return bits<f32>(bits<u32>(a) & 0x7fffffffu); }
PTX_INLINE f64 fabs_(f64 a) { return bits<f64>(bits<u64>(a) & ~(1ull << 63)); }
PTX_INLINE f32 copysign_(f32 a, f32 b) { return __builtin_copysignf(b, a); }
PTX_INLINE f64 copysign_(f64 a, f64 b) { return __builtin_copysign(b, a); }

enum Test { T_FINITE, T_INFINITE, T_NUMBER, T_NOTANUMBER, T_NORMAL, T_SUBNORMAL };
template <class F> PTX_INLINE bool testp(u32 test, F a) {
  F size = fabs_(a), least = sizeof(F) == 4 ? (F)1.17549435082228750797e-38 : (F)2.2250738585072014e-308;
  bool nan_ = a != a, inf_ = size > (sizeof(F) == 4 ? (F)3.40282346638528859812e38 : (F)1.7976931348623157e308);
  switch (test) {
    case T_FINITE: return !nan_ && !inf_;
    case T_INFINITE: return inf_;
    case T_NUMBER: return !nan_;
    case T_NOTANUMBER: return nan_;
    case T_NORMAL: return !nan_ && !inf_ && size >= least;
    default: return size > 0 && size < least;
  }
}

}  // namespace ptx
