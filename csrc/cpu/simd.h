// Vectors of floats for the instruction set of a translation unit: arithmetic, conversion of rows
// to and from float32, and transposition.
//
// This header and those that include it use a namespace per instruction set and no templates of the
// standard library. The linker keeps one copy of an inline function, and that copy must not need
// instructions that the processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "problem.h"

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
// Vectors per tile of query rows, which lie along the lanes. Keys and sums are read from the L2
// cache once per tile, so the tile is as wide as the registers allow.
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

SEFI_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SEFI_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
// Load the first count lanes, 0 < count < kLanes, and zeros.
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

// a * b + c, rounded once if the processor can. The compiler must not fuse by itself, because then
// a * b - c * d would differ from zero for equal products.
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

// The second operand if either is NaN, like the x86 instruction.
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

// 2**x for x <= 0 with an error below 1 ulp, exactly 1 at zero; NaN stays NaN. Underflow gives
// zero, or 2**-126 without an instruction that scales by powers of two.
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
    // If x is NaN, the bits of `shifted` must not turn the NaN in p into a number.
    return (Vec)((IntVec)p + (((IntVec)shifted << 23) & (IntVec)(x == x)));
#endif
}

typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));
typedef uint16_t UnalignedHalfVec __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef uint32_t UIntVec __attribute__((vector_size(4 * kLanes)));

SEFI_INLINE Vec from_bfloat16(HalfVec h) {
    return (Vec)(__builtin_convertvector(h, UIntVec) << 16);
}

#if defined(__AVX512BF16__)
SEFI_INLINE HalfVec to_bfloat16(Vec v) { return (HalfVec)_mm512_cvtneps_pbh((__m512)v); }
#else
SEFI_INLINE HalfVec to_bfloat16(Vec v) {
    const UIntVec bits = (UIntVec)v;
    // Round to nearest even; the payload of a NaN must not round up to infinity.
    const UIntVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UIntVec is_nan = (UIntVec)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan),
                                   HalfVec);
}
#endif

#if defined(__AVX512F__)
SEFI_INLINE Vec from_float16(HalfVec h) { return (Vec)_mm512_cvtph_ps((__m256i)h); }
SEFI_INLINE HalfVec to_float16(Vec v) {
    return (HalfVec)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
SEFI_INLINE Vec from_float16(HalfVec h) { return (Vec)_mm256_cvtph_ps((__m128i)h); }
SEFI_INLINE HalfVec to_float16(Vec v) {
    return (HalfVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
SEFI_INLINE float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

SEFI_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

inline float from_float16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // The multiplication changes the exponent bias; it is exact for subnormal numbers too.
    return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_float16(float value) {
    const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 rounds at the last bit of the result.
        return uint16_t(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
    }
    return uint16_t(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
}

SEFI_INLINE Vec from_float16(HalfVec h) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = from_float16(uint16_t(h[i]));
    return v;
}

SEFI_INLINE HalfVec to_float16(Vec v) {
    HalfVec h;
    for (int i = 0; i < kLanes; ++i) h[i] = to_float16(float(v[i]));
    return h;
}
#endif

SEFI_INLINE Vec from_half(HalfVec h, DType dtype) {
    return dtype == DType::float16 ? from_float16(h) : from_bfloat16(h);
}

SEFI_INLINE HalfVec to_half(Vec v, DType dtype) {
    return dtype == DType::float16 ? to_float16(v) : to_bfloat16(v);
}

SEFI_INLINE void store_part(uint16_t* p, HalfVec v, int count) {
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1u), (__m256i)v);
#else
    __builtin_memcpy(p, &v, 2 * size_t(count));
#endif
}

// Load count elements as float32, and zeros up to a whole vector.
inline void load_row(const char* source, DType dtype, int64_t count, float* row) {
    const int64_t whole = count / kLanes * kLanes;
    const int rest = int(count - whole);
    if (dtype == DType::float32) {
        const float* from = reinterpret_cast<const float*>(source);
        for (int64_t i = 0; i < whole; i += kLanes) store(row + i, load(from + i));
        if (rest) store(row + whole, load_part(from + whole, rest));
        return;
    }
    const uint16_t* from = reinterpret_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < whole; i += kLanes) {
        store(row + i, from_half(*reinterpret_cast<const UnalignedHalfVec*>(from + i), dtype));
    }
    if (rest) {
        HalfVec last{};
        __builtin_memcpy(&last, from + whole, 2 * size_t(rest));
        store(row + whole, from_half(last, dtype));
    }
}

// Store count elements of factor * row in the dtype; row is readable up to a whole vector.
inline void store_row(const float* row, int64_t count, float factor, char* target, DType dtype) {
    const int64_t whole = count / kLanes * kLanes;
    const int rest = int(count - whole);
    if (dtype == DType::float32) {
        float* to = reinterpret_cast<float*>(target);
        for (int64_t i = 0; i < whole; i += kLanes) store(to + i, factor * load(row + i));
        if (rest) store_part(to + whole, factor * load(row + whole), rest);
        return;
    }
    uint16_t* to = reinterpret_cast<uint16_t*>(target);
    for (int64_t i = 0; i < whole; i += kLanes) {
        *reinterpret_cast<UnalignedHalfVec*>(to + i) = to_half(factor * load(row + i), dtype);
    }
    if (rest) {
        const HalfVec last = to_half(factor * load(row + whole), dtype);
        store_part(to + whole, last, rest);
    }
}

// Four-by-four transposition within every 128-bit part.
#if defined(__AVX512F__)
SEFI_INLINE void transpose_parts(Vec (&v)[4]) {
    const __m512 a = _mm512_unpacklo_ps((__m512)v[0], (__m512)v[1]);
    const __m512 b = _mm512_unpackhi_ps((__m512)v[0], (__m512)v[1]);
    const __m512 c = _mm512_unpacklo_ps((__m512)v[2], (__m512)v[3]);
    const __m512 d = _mm512_unpackhi_ps((__m512)v[2], (__m512)v[3]);
    v[0] = (Vec)_mm512_shuffle_ps(a, c, 0x44);
    v[1] = (Vec)_mm512_shuffle_ps(a, c, 0xee);
    v[2] = (Vec)_mm512_shuffle_ps(b, d, 0x44);
    v[3] = (Vec)_mm512_shuffle_ps(b, d, 0xee);
}
#elif defined(__AVX2__)
SEFI_INLINE void transpose_parts(Vec (&v)[4]) {
    const __m256 a = _mm256_unpacklo_ps((__m256)v[0], (__m256)v[1]);
    const __m256 b = _mm256_unpackhi_ps((__m256)v[0], (__m256)v[1]);
    const __m256 c = _mm256_unpacklo_ps((__m256)v[2], (__m256)v[3]);
    const __m256 d = _mm256_unpackhi_ps((__m256)v[2], (__m256)v[3]);
    v[0] = (Vec)_mm256_shuffle_ps(a, c, 0x44);
    v[1] = (Vec)_mm256_shuffle_ps(a, c, 0xee);
    v[2] = (Vec)_mm256_shuffle_ps(b, d, 0x44);
    v[3] = (Vec)_mm256_shuffle_ps(b, d, 0xee);
}
#else
SEFI_INLINE void transpose_parts(Vec (&v)[4]) {
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < i; ++j) {
            const float previous = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = previous;
        }
    }
}
#endif

typedef float Part __attribute__((vector_size(16)));
typedef float UnalignedPart __attribute__((vector_size(16), aligned(4), may_alias));

// Load four columns of kLanes rows: out[j] is column j.
SEFI_INLINE void load_columns(const float* rows, int64_t stride, Vec (&out)[4]) {
    for (int i = 0; i < 4; ++i) {
        const float* row = rows + i * stride;
#if defined(__AVX512F__)
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(row));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 4 * stride), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 8 * stride), 2);
        out[i] = (Vec)_mm512_insertf32x4(v, _mm_loadu_ps(row + 12 * stride), 3);
#elif defined(__AVX2__)
        const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps(row));
        out[i] = (Vec)_mm256_insertf128_ps(v, _mm_loadu_ps(row + 4 * stride), 1);
#else
        out[i] = load(row);
#endif
    }
    transpose_parts(out);
}

SEFI_INLINE void store_columns(Vec (&in)[4], float* rows, int64_t stride) {
    transpose_parts(in);
    for (int i = 0; i < 4; ++i) {
        float* row = rows + i * stride;
#if defined(__AVX512F__)
        _mm_storeu_ps(row, _mm512_castps512_ps128((__m512)in[i]));
        _mm_storeu_ps(row + 4 * stride, _mm512_extractf32x4_ps((__m512)in[i], 1));
        _mm_storeu_ps(row + 8 * stride, _mm512_extractf32x4_ps((__m512)in[i], 2));
        _mm_storeu_ps(row + 12 * stride, _mm512_extractf32x4_ps((__m512)in[i], 3));
#elif defined(__AVX2__)
        _mm_storeu_ps(row, _mm256_castps256_ps128((__m256)in[i]));
        _mm_storeu_ps(row + 4 * stride, _mm256_extractf128_ps((__m256)in[i], 1));
#else
        store(row, in[i]);
#endif
    }
}

// columns[d][row] = factor * rows[row][d] for J vectors of rows; width is a multiple of 4.
template <int J>
inline void rows_to_columns(const float* rows, int64_t stride, int64_t width, float factor,
                            float* columns) {
    for (int j = 0; j < J; ++j) {
        for (int64_t d = 0; d < width; d += 4) {
            Vec v[4];
            load_columns(rows + j * kLanes * stride + d, stride, v);
            for (int i = 0; i < 4; ++i) {
                store(columns + (d + i) * J * kLanes + j * kLanes, factor * v[i]);
            }
        }
    }
}

template <int J>
inline void columns_to_rows(const float* columns, int64_t width, float* rows, int64_t stride) {
    for (int j = 0; j < J; ++j) {
        for (int64_t d = 0; d < width; d += 4) {
            Vec v[4];
            for (int i = 0; i < 4; ++i) v[i] = load(columns + (d + i) * J * kLanes + j * kLanes);
            store_columns(v, rows + j * kLanes * stride + d, stride);
        }
    }
}

}  // namespace SEFI_ISA
}  // namespace sefi
