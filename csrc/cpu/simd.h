// Vectors of floats for the instruction set that this translation unit is compiled for.
//
// Everything here and in the headers that include it lives in a namespace of its own for each
// instruction set, and uses no templates of the standard library: the linker keeps one copy of an
// inline function, which must never be one that needs instructions the machine may lack.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SEFI_INLINE inline __attribute__((always_inline))

namespace sefi {
namespace SEFI_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif
// Query rows lie along the lanes; a full tile is this many vectors wide. Keys and sums come from the
// second-level cache once a tile: wide tiles pay where the registers can hold them.
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

SEFI_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SEFI_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
// The first count lanes, 0 < count < kLanes; zeros behind them.
SEFI_INLINE Vec load_part(const float* p, int count) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p);
#else
    Vec v{};
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}

SEFI_INLINE void store_part(float* p, Vec v, int count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), (__m512)v);
#else
    for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

SEFI_INLINE Vec broadcast(float s) { return s - Vec{}; }

// a * b + c, rounded once where the processor can. The compiler fuses nothing by itself: that would
// make a * b - c * d differ from zero for equal products.
SEFI_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// The second operand where either is NaN, as the x86 instruction does.
SEFI_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

SEFI_INLINE float sum(Vec v) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

// 2**x for x <= 0, exactly 1 at zero, relative error below 1 ulp; NaN stays NaN. What is too small
// becomes zero, or 2**-126 where the processor cannot scale by powers of two itself.
SEFI_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
    const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = max(broadcast(-126.0f), x);
    // Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits of the sum.
    const Vec magic = broadcast(12582912.0f);
    const Vec shifted = (x - 0.5f) + magic;
    const Vec f = x - (shifted - magic);
#endif
    // 2**f for 0 <= f <= 1, within 2e-9 before rounding.
    Vec p = fma(f, broadcast(2.16129158e-4f), broadcast(1.24678462e-3f));
    p = fma(f, p, broadcast(9.67545159e-3f));
    p = fma(f, p, broadcast(5.54852806e-2f));
    p = fma(f, p, broadcast(2.40229306e-1f));
    p = fma(f, p, broadcast(6.93147044e-1f));
    p = fma(f, p, broadcast(1.0f));
#if defined(__AVX512DQ__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    // The bits of a NaN in shifted would make a number of the NaN in p.
    return (Vec)((IntVec)p + (((IntVec)shifted << 23) & (IntVec)(x == x)));
#endif
}

}  // namespace SEFI_ISA
}  // namespace sefi
