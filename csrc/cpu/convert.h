// Rows of float32, float16 or bfloat16 in the caller's memory from and to float32 rows of scratch.
#pragma once

#include "problem.h"
#include "cpu/simd.h"

namespace sefi {
namespace SEFI_ISA {

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
    // Round to nearest even; a NaN's payload must not round up into infinity.
    const UIntVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const UIntVec is_nan = (UIntVec)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (((bits >> 16) | 0x40u) & is_nan), HalfVec);
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
    // The multiplication moves the exponent's bias, and is exact for subnormal numbers too.
    return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t to_float16(float value) {
    const uint32_t bits = as_bits(value), sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 rounds at the place where the last bit of the result is.
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

// count elements to float32, and zeros up to a whole vector.
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

// count elements of factor * row in the given dtype; row is readable up to a whole vector.
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

}  // namespace SEFI_ISA
}  // namespace sefi
