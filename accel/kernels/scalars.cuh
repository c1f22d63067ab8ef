// Element types, without CUDA's headers: NVRTC has none.
//
// REAL     float or double: accumulators, biases, weights of routes, results
// OPERAND  rows that enter a product: REAL, or half16 / bfloat16 / float (tf32) on tensor cores
// WEIGHT   expert matrices as they lie in memory
#pragma once

typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

struct half16 {  // IEEE binary16
    unsigned short bits;
};
struct bfloat16 {
    unsigned short bits;
};

#ifndef REAL
#define REAL float
#endif
#ifndef OPERAND
#define OPERAND REAL
#endif
#ifndef WEIGHT
#define WEIGHT OPERAND
#endif

#define DEVICE static __device__ __forceinline__

DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
DEVICE float widen(bfloat16 x) { return __uint_as_float((uint32)x.bits << 16); }
DEVICE float widen(half16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Round to nearest, ties to even.
template <typename T>
DEVICE T narrow(REAL x) {
    return T(x);
}
#if !defined(DOUBLE)
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
    bfloat16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <>
__device__ __forceinline__ half16 narrow<half16>(float x) {
    half16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#endif

// What a warp adds up, in the same tree whatever the schedule.
template <typename T>
DEVICE T warp_sum(T x, int width = 32) {
    for (int step = width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
