// Query rows to columns and back: in a tile, rows lie along the lanes.
#pragma once

#include "cpu/simd.h"

namespace sefi {
namespace SEFI_ISA {

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
            const float held = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = held;
        }
    }
}
#endif

typedef float Part __attribute__((vector_size(16)));
typedef float UnalignedPart __attribute__((vector_size(16), aligned(4), may_alias));

// Four columns of kLanes rows: out[j] holds column j.
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
