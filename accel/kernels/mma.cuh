// Instructions of tensor cores and of asynchronous copies, as inline PTX (sm_80 and later).
//
// Fragments are those of mma.sync m16n8: of 16 rows and 32 bytes of depth, whatever the type, which
// is m16n8k16 for the half types and m16n8k8 for tf32.
#pragma once
#include "scalars.cuh"

DEVICE uint32 shared_address(const void *p) { return (uint32)__cvta_generic_to_shared(p); }

// p + count * bytes in one instruction: compilers would make a second pointer that runs along.
DEVICE const char *advance(const void *p, int count, int bytes) {
    const char *q;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(q) : "r"(count), "r"(bytes), "l"(p));
    return q;
}

// 16 bytes, or zeros if `at` has reached `limit`; the source is not touched then.
DEVICE void copy_async_16(uint32 to, const char *from, int at, int limit) {
    asm volatile(
        "{\n .reg .pred ignored;\n setp.ge.s32 ignored, %2, %3;\n"
        " cp.async.cg.shared.global [%0], [%1], 16, ignored;\n}" ::"r"(to),
        "l"(__cvta_generic_to_global(from)), "r"(at), "r"(limit)
        : "memory");
}

DEVICE void copy_async_4(uint32 to, const char *from, int at, int limit) {
    asm volatile(
        "{\n .reg .pred ignored;\n setp.ge.s32 ignored, %2, %3;\n"
        " cp.async.ca.shared.global [%0], [%1], 4, ignored;\n}" ::"r"(to),
        "l"(__cvta_generic_to_global(from)), "r"(at), "r"(limit)
        : "memory");
}

// An element of 2 bytes, by the same rule.
DEVICE uint32 load_2(const char *from, int at, int limit) {
    unsigned short v;
    asm volatile(
        "{\n .reg .pred inside;\n setp.lt.s32 inside, %2, %3;\n mov.b16 %0, 0;\n"
        " @inside ld.global.nc.b16 %0, [%1];\n}"
        : "=h"(v)
        : "l"(__cvta_generic_to_global(from)), "r"(at), "r"(limit));
    return v;
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int NEWER>  // Groups that may still be under way.
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");
}

DEVICE void store_shared_16(uint32 to, const uint32 (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

DEVICE uint32 load_shared_4(uint32 from) {
    uint32 v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
    return v;
}

DEVICE void load_matrices(uint32 (&v)[4], uint32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
}

DEVICE void load_matrices_transposed(uint32 (&v)[4], uint32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(row)
                 : "memory");
}

// Nearest, ties away from zero: the tensor cores would cut the bits off.
DEVICE void round_tf32(uint32 &v) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(v) : "f"(__uint_as_float(v)));
}

#define MULTIPLY_ADD(FORM)                                                                         \
    asm("mma.sync.aligned." FORM " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                 \
        "{%0, %1, %2, %3};"                                                                        \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                   \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

DEVICE void multiply_add(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, bfloat16) {
    MULTIPLY_ADD("m16n8k16.row.col.f32.bf16.bf16.f32");
}
DEVICE void multiply_add(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, half16) {
    MULTIPLY_ADD("m16n8k16.row.col.f32.f16.f16.f32");
}
DEVICE void multiply_add(float (&sum)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, float) {
    MULTIPLY_ADD("m16n8k8.row.col.f32.tf32.tf32.f32");
}
