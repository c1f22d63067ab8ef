// Integer instructions. Arithmetic wraps (the compiler is told -fwrapv); shifts clamp as PTX says.
#pragma once
#include "scalars.hpp"

namespace ptx {

#define PTX_OP template <class T> PTX_INLINE
#define PTX_BITS (8u * (u32)sizeof(T))

PTX_OP T add(T a, T b) { return (T)(a + b); }
PTX_OP T sub(T a, T b) { return (T)(a - b); }
PTX_OP T and_(T a, T b) { return (T)(a & b); }
PTX_OP T or_(T a, T b) { return (T)(a | b); }
PTX_OP T xor_(T a, T b) { return (T)(a ^ b); }
PTX_OP T not_(T a) { return (T)~a; }
PTX_OP T cnot(T a) { return (T)(a == 0); }
PTX_OP T neg(T a) { return (T)(0 - a); }
PTX_OP T abs_(T a) { return a < 0 ? (T)(0 - a) : a; }
PTX_OP T min_(T a, T b) { return b < a ? b : a; }
PTX_OP T max_(T a, T b) { return a < b ? b : a; }

PTX_OP T mul_lo(T a, T b) { return (T)((typename Unsigned<T>::type)a * 1ull * (typename Unsigned<T>::type)b); }
PTX_OP T mul_hi(T a, T b) {
  typedef typename Wide<T>::type W;
  return (T)(((W)a * (W)b) >> PTX_BITS);
}
PTX_OP typename Wide<T>::type mul_wide(T a, T b) {
  typedef typename Wide<T>::type W;
  return (W)((W)a * (W)b);
}
PTX_OP T mad_lo(T a, T b, T c) { return add<T>(mul_lo<T>(a, b), c); }
PTX_OP T mad_hi(T a, T b, T c) { return add<T>(mul_hi<T>(a, b), c); }
PTX_OP typename Wide<T>::type mad_wide(T a, T b, typename Wide<T>::type c) {
  return (typename Wide<T>::type)(mul_wide<T>(a, b) + c);
}
PTX_INLINE s32 sat32(s64 v) { return v > 2147483647ll ? 2147483647 : v < -2147483648ll ? (s32)-2147483648ll : (s32)v; }
PTX_OP T add_sat(T a, T b) { return sat32((s64)a + b); }
PTX_OP T sub_sat(T a, T b) { return sat32((s64)a - b); }
PTX_OP T mad_hi_sat(T a, T b, T c) { return sat32((s64)mul_hi<T>(a, b) + c); }

PTX_INLINE u32 mul24(u32 a, u32 b) { return (a & 0xffffffu) * (b & 0xffffffu); }
PTX_INLINE u32 mad24(u32 a, u32 b, u32 c) { return mul24(a, b) + c; }

// Divisors are tested for zero before these are called.
PTX_OP T div_(T a, T b) { return b == (T)-1 && (T)-1 < 0 ? (T)(0 - a) : (T)(a / b); }
PTX_OP T rem_(T a, T b) { return b == (T)-1 && (T)-1 < 0 ? (T)0 : (T)(a % b); }

PTX_OP T shl(T a, u32 n) { return n >= PTX_BITS ? (T)0 : (T)(a << n); }
PTX_OP T shr(T a, u32 n) { return n >= PTX_BITS ? (a < 0 ? (T)-1 : (T)0) : (T)(a >> n); }

PTX_INLINE u32 shf_l_wrap(u32 a, u32 b, u32 c) { c &= 31; return c ? (b << c) | (a >> (32 - c)) : b; }
PTX_INLINE u32 shf_r_wrap(u32 a, u32 b, u32 c) { c &= 31; return c ? (b << (32 - c)) | (a >> c) : a; }
PTX_INLINE u32 shf_l_clamp(u32 a, u32 b, u32 c) { return c >= 32 ? a : shf_l_wrap(a, b, c); }
PTX_INLINE u32 shf_r_clamp(u32 a, u32 b, u32 c) { return c >= 32 ? b : shf_r_wrap(a, b, c); }

PTX_INLINE u32 popc(u32 a) { return (u32)__builtin_popcount(a); }
PTX_INLINE u32 popc(u64 a) { return (u32)__builtin_popcountll(a); }
PTX_INLINE u32 clz(u32 a) { return a ? (u32)__builtin_clz(a) : 32; }
PTX_INLINE u32 clz(u64 a) { return a ? (u32)__builtin_clzll(a) : 64; }
PTX_OP T brev(T a) {
  T out = 0;
  for (u32 i = 0; i < PTX_BITS; i++) out = (T)(out | (T)((T)(a >> i) & 1) << (PTX_BITS - 1 - i));
  return out;
}
PTX_OP u32 bfind(T a, bool shift_amount) {
  typedef typename Unsigned<T>::type U;
  U v = a < 0 ? (U)~a : (U)a;
  if (!v) return 0xffffffffu;
  u32 at = PTX_BITS - 1 - clz(v);
  return shift_amount ? PTX_BITS - 1 - at : at;
}

PTX_OP T bfe(T a, u32 b, u32 c) {
  u32 pos = b & 0xff, len = c & 0xff, msb = PTX_BITS - 1;
  u32 last = pos + len - 1;
  bool sign = len && (T)-1 < 0 && (((a >> (last < msb ? last : msb)) & 1) != 0);
  T out = 0;
  for (u32 i = 0; i <= msb; i++) {
    bool bit = i < len && pos + i <= msb ? ((a >> (pos + i)) & 1) != 0 : sign;
    if (bit) out = (T)(out | (T)((T)1 << i));
  }
  return out;
}
PTX_OP T bfi(T a, T b, u32 c, u32 d) {
  u32 pos = c & 0xff, len = d & 0xff;
  if (pos >= PTX_BITS || !len) return b;
  T mask = len >= PTX_BITS ? (T)~(T)0 : (T)(((T)1 << len) - 1);
  return (T)((b & (T)~(T)(mask << pos)) | (T)((a & mask) << pos));
}
PTX_INLINE u32 szext(u32 a, u32 n, bool is_signed) {
  if (n >= 32) return a;
  if (!n) return 0;
  u32 low = a & ((1u << n) - 1);
  return is_signed && (low >> (n - 1)) ? low | (~0u << n) : low;
}
PTX_INLINE u32 bmsk(u32 a, u32 b) {
  u32 mask = b >= 32 ? ~0u : (1u << b) - 1;
  return a >= 32 ? 0 : mask << a;
}
PTX_OP T sad(T a, T b, T c) { return (T)(c + (a < b ? (T)(b - a) : (T)(a - b))); }

PTX_INLINE u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 out = 0;
  if (table & 0x01) out |= ~a & ~b & ~c;
  if (table & 0x02) out |= ~a & ~b & c;
  if (table & 0x04) out |= ~a & b & ~c;
  if (table & 0x08) out |= ~a & b & c;
  if (table & 0x10) out |= a & ~b & ~c;
  if (table & 0x20) out |= a & ~b & c;
  if (table & 0x40) out |= a & b & ~c;
  if (table & 0x80) out |= a & b & c;
  return out;
}

PTX_INLINE u32 prmt_select(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 out = 0;
  for (u32 i = 0; i < 4; i++) {
    u32 nibble = (selector >> (4 * i)) & 0xf;
    u32 byte = (u32)(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * i);
  }
  return out;
}
PTX_INLINE u32 prmt(u32 a, u32 b, u32 c) { return prmt_select(a, b, c); }
// The six named modes of prmt, as selectors for each value of c[1:0].
PTX_INLINE u32 prmt_mode(u32 a, u32 b, u32 c, const u16* table) { return prmt_select(a, b, table[c & 3]); }

PTX_INLINE s32 byte_of(u32 v, u32 i, bool is_signed) {
  u8 byte = (u8)(v >> (8 * i));
  return is_signed ? (s32)(s8)byte : (s32)byte;
}
PTX_INLINE u32 dp4a(u32 a, u32 b, u32 c, bool a_signed, bool b_signed) {
  u32 out = c;
  for (u32 i = 0; i < 4; i++) out += (u32)(byte_of(a, i, a_signed) * byte_of(b, i, b_signed));
  return out;
}

#undef PTX_BITS
}  // namespace ptx
