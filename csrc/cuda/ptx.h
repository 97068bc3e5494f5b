// Inline PTX: matrix instructions, asynchronous copies and conversions.
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

// Two elements in one register; the first is in the low half.
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

SEFI_DEVICE float to_float(float x) { return x; }
SEFI_DEVICE float to_float(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}
SEFI_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

SEFI_DEVICE void store_float(float x, float& to) { to = x; }
template <class E>
SEFI_DEVICE void store_float(float x, E& to) {
    to.bits = uint16_t(pack<E>(x, 0.0f));
}

// 2 to the power of x, accurate to two units in the last place; results below 2**-126 are zero.
SEFI_DEVICE float exp2_approx(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

// 1 / x, accurate to one unit in the last place.
SEFI_DEVICE float rcp_approx(float x) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    return inverse;
}

// x * y rounded, never fused with an addition.
SEFI_DEVICE float mul_rn(float x, float y) { return __fmul_rn(x, y); }

SEFI_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

// The instructions below take 32-bit addresses inside shared memory.
SEFI_DEVICE uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

// Copy 16 bytes from global to shared memory, or zeros if `inside` is false.
SEFI_DEVICE void cp_async(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
SEFI_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for all copy groups of this thread but the newest kBut.
template <int kBut>
SEFI_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kBut) : "memory");
}

// Programmatic dependent launch: the next kernel of the stream may start once every block has
// called launch_dependents or ended. wait_for_dependency waits until the previous kernel has ended
// and its results are visible.
SEFI_DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
SEFI_DEVICE void wait_for_dependency() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Barrier of two adjacent warps, the first of them even.
SEFI_DEVICE void sync_warp_pair() {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 64) : "memory");
}

// Load 8x8 matrices of two-byte elements; lane i has the address of row i % 8 of matrix i / 8.
SEFI_DEVICE void ldmatrix(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
SEFI_DEVICE void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
// Two matrices, at the addresses of lanes 0 to 15.
SEFI_DEVICE void ldmatrix(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
SEFI_DEVICE void ldmatrix_trans(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}

// sums[16x8] += a[16x16] * b[16x8] with the fragment layouts of the PTX ISA.
template <class E>
SEFI_DEVICE void mma_sync(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// sums[16x8] += a[16x8] * b[8x8].
template <class E>
SEFI_DEVICE void mma_sync(float (&sums)[4], const uint32_t (&a)[2], uint32_t b0);

#define SEFI_MULTIPLY_ADD(ELEMENT, NAME)                                                        \
    template <>                                                                                 \
    SEFI_DEVICE void mma_sync<ELEMENT>(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,   \
                                       uint32_t b1) {                                           \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                              \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                    \
    }                                                                                           \
    template <>                                                                                 \
    SEFI_DEVICE void mma_sync<ELEMENT>(float (&sums)[4], const uint32_t (&a)[2], uint32_t b0) { \
        asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                               \
            ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                          \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                        \
            : "r"(a[0]), "r"(a[1]), "r"(b0));                                                   \
    }
SEFI_MULTIPLY_ADD(Half, "f16")
SEFI_MULTIPLY_ADD(BFloat16, "bf16")
#undef SEFI_MULTIPLY_ADD

}  // namespace sefi::cuda
