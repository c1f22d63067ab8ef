// Scalar types, bit casts and the attributes that every other header uses.
#pragma once
#include <stdint.h>
#include <string.h>

#define PTX_INLINE static inline __attribute__((always_inline))

namespace ptx {

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;
typedef unsigned __int128 u128;
typedef __int128 s128;

template <class To, class From>
PTX_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To out;
  memcpy(&out, &value, sizeof out);
  return out;
}

template <class T>
PTX_INLINE T get(const u8* at) {
  T out;
  memcpy(&out, at, sizeof out);
  return out;
}

template <class T>
PTX_INLINE void put(u8* at, T value) {
  memcpy(at, &value, sizeof value);
}

template <class T> struct Wide;
template <> struct Wide<u16> { typedef u32 type; };
template <> struct Wide<s16> { typedef s32 type; };
template <> struct Wide<u32> { typedef u64 type; };
template <> struct Wide<s32> { typedef s64 type; };
template <> struct Wide<u64> { typedef u128 type; };
template <> struct Wide<s64> { typedef s128 type; };

template <class T> struct Unsigned { typedef T type; };
template <> struct Unsigned<s16> { typedef u16 type; };
template <> struct Unsigned<s32> { typedef u32 type; };
template <> struct Unsigned<s64> { typedef u64 type; };

}  // namespace ptx
