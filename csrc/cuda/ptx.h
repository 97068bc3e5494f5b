// Everything that only the device can do: matrix instructions, asynchronous copies, conversions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sefi::cuda {

#define SEFI_DEVICE __device__ __forceinline__

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// Two elements in one register, the first in the low half.
template <class E>
SEFI_DEVICE uint32_t pack(float first, float second);

template <>
SEFI_DEVICE uint32_t pack<Half>(float first, float second) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

template <>
SEFI_DEVICE uint32_t pack<BFloat16>(float first, float second) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

SEFI_DEVICE float widen(float x) { return x; }
SEFI_DEVICE float widen(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
SEFI_DEVICE float widen(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

SEFI_DEVICE void narrow(float x, float& to) { to = x; }
template <class E>
SEFI_DEVICE void narrow(float x, E& to) {
    to.bits = uint16_t(pack<E>(x, 0.0f));
}

// 2 to the power of x, accurate to two units in the last place; results below 2**-126 are zero.
SEFI_DEVICE float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// 1 / x, accurate to one unit in the last place.
SEFI_DEVICE float reciprocal(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

// x * y, rounded: not one half of a fused multiply-add.
SEFI_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }

SEFI_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

// Addresses inside shared memory are 32 bits wide in the instructions below.
SEFI_DEVICE uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes on their way from global to shared memory; zeros arrive where `inside` is false.
SEFI_DEVICE void copy_async(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
SEFI_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread's copies but the newest kBut.
template <int kBut>
SEFI_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kBut) : "memory");
}

// Lets the next kernel of the stream come once all blocks have said so, or ended; and waits, in
// that kernel, until the one before it has ended and all that it wrote is there.
SEFI_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
SEFI_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Waits for the other one of two neighbouring warps.
SEFI_DEVICE void meet_neighbour() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 64) : "memory");
}

// Four 8x8 matrices of two-byte elements; lane i gives the address of row i % 8 of matrix i / 8.
SEFI_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
SEFI_DEVICE void load_transposed(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
// Two matrices, by the addresses of lanes 0 to 15.
SEFI_DEVICE void load_matrices(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
SEFI_DEVICE void load_transposed(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}

// sums[16x8] += a[16x16] * b[16x8], fragments as the PTX ISA lays them out.
template <class E>
SEFI_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// The same with an inner length of 8.
template <class E>
SEFI_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[2], uint32_t b0);

#define SEFI_MULTIPLY_ADD(ELEMENT, NAME)                                                        \
    template <>                                                                                 \
    SEFI_DEVICE void multiply_add<ELEMENT>(float(&sums)[4], const uint32_t(&a)[4], uint32_t b0, \
                                           uint32_t b1) {                                       \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                              \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
    }                                                                                           \
    template <>                                                                                 \
    SEFI_DEVICE void multiply_add<ELEMENT>(float(&sums)[4], const uint32_t(&a)[2],              \
                                           uint32_t b0) {                                       \
        asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                               \
            ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                          \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
            : "r"(a[0]), "r"(a[1]), "r"(b0));                                                   \
    }
SEFI_MULTIPLY_ADD(Half, "f16")
SEFI_MULTIPLY_ADD(BFloat16, "bf16")
#undef SEFI_MULTIPLY_ADD

}  // namespace sefi::cuda
