// Softmax of 16 query rows, keys along the lanes.
#pragma once

#include "cpu/bf16_tile.h"
#include "cpu/prefetch.h"
#include "cpu/softmax.h"

namespace sefi {
namespace SEFI_ISA {

// Vectors of a row of keys, and the lanes of the last one that are keys.
struct KeyLanes {
    int64_t vectors;
    __mmask16 last;

    explicit KeyLanes(int64_t keys)
        : vectors((keys + kLanes - 1) / kLanes),
          last(__mmask16(0xffffu >> (vectors * kLanes - keys))) {}

    __mmask16 mask(int64_t vector) const { return vector + 1 < vectors ? __mmask16(0xffff) : last; }
};

// Combine all lanes of v[i] in lane i of the result.
template <class Combine>
SEFI_INLINE Vec combine_lanes(Vec (&v)[16], const Combine& combine) {
    Vec pairs[8], fours[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)v[i], b = (__m512)v[i + 8];
        // Lower halves hold lanes of a, upper halves lanes of b.
        pairs[i] =
            combine((Vec)_mm512_shuffle_f32x4(a, b, 0x44), (Vec)_mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)pairs[i], b = (__m512)pairs[i + 4];
        fours[i] =
            combine((Vec)_mm512_shuffle_f32x4(a, b, 0x88), (Vec)_mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 a = (__m512)fours[i], b = (__m512)fours[i + 2];
        halves[i] = combine((Vec)_mm512_shuffle_ps(a, b, 0x44), (Vec)_mm512_shuffle_ps(a, b, 0xee));
    }
    const __m512 a = (__m512)halves[0], b = (__m512)halves[1];
    const Vec all = combine((Vec)_mm512_shuffle_ps(a, b, 0x88), (Vec)_mm512_shuffle_ps(a, b, 0xdd));
    // Lane l of part p holds the result of v[8 (p % 2) + 4 (p / 2) + 2 (l % 2) + l / 2].
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Vec)_mm512_permutexvar_ps(order, (__m512)all);
}

SEFI_INLINE Vec sum_lanes(Vec (&v)[16]) {
    return combine_lanes(v, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}

SEFI_INLINE Vec max_lanes(Vec (&v)[16]) {
    return combine_lanes(v, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
}

// Turn scores of 16 rows into probabilities before division by their sum, and zeros past the keys.
// inv_sum is one over the sums. kVectors is keys.vectors, or 0 for any number.
template <int kVectors>
inline void softmax_rows(float* scores, int64_t stride, const KeyLanes& keys, float sm_scale_log2,
                         float* inv_sum, Prefetcher& prefetcher) {
    const int64_t vectors = kVectors ? kVectors : keys.vectors;
    Vec rows[16];
    for (int r = 0; r < 16; ++r) {
        const float* row = scores + r * stride;
        const int64_t end = vectors - 1;
        Vec row_max = (Vec)_mm512_mask_loadu_ps((__m512)broadcast(-__builtin_inff()), keys.last,
                                                row + end * kLanes);
#pragma GCC unroll 8
        for (int64_t v = 0; v < end; ++v) row_max = max(row_max, load(row + v * kLanes));
        rows[r] = row_max;
    }
    float row_max[16];
    store(row_max, max_lanes(rows));
    for (int r = 0; r < 16; ++r) {
        float* row = scores + r * stride;
        if (r % 4 == 0) prefetcher.step();
        if (r % 8 == 0) keep_awake();
        Vec total{};
#pragma GCC unroll 8
        for (int64_t v = 0; v < vectors; ++v) {
            Vec p = exp2(sm_scale_log2 * (load(row + v * kLanes) - broadcast(row_max[r])));
            if (v + 1 == vectors) p = (Vec)_mm512_maskz_mov_ps(keys.last, (__m512)p);
            total += p;
            store(row + v * kLanes, p);
        }
        rows[r] = total;
    }
    store(inv_sum, 1.0f / sum_lanes(rows));
}

inline void softmax_rows(float* scores, int64_t stride, const KeyLanes& keys, float sm_scale_log2,
                         float* inv_sum, Prefetcher& prefetcher) {
    // 77 text tokens.
    if (keys.vectors == 5) {
        softmax_rows<5>(scores, stride, keys, sm_scale_log2, inv_sum, prefetcher);
    } else {
        softmax_rows<0>(scores, stride, keys, sm_scale_log2, inv_sum, prefetcher);
    }
}

}  // namespace SEFI_ISA
}  // namespace sefi
