// Probabilities of 16 query rows: rows down, keys along the lanes.
#pragma once

#include "cpu/ahead.h"
#include "cpu/dot_tile.h"
#include "cpu/softmax.h"

namespace sefi {
namespace SEFI_ISA {

// The keys of a row: whole vectors, and which lanes of the last one are keys.
struct KeyLanes {
    int64_t vectors;
    __mmask16 last;

    explicit KeyLanes(int64_t keys)
        : vectors((keys + kLanes - 1) / kLanes),
          last(__mmask16(0xffffu >> (vectors * kLanes - keys))) {}

    __mmask16 mask(int64_t vector) const { return vector + 1 < vectors ? __mmask16(0xffff) : last; }
};

// Lane i of the result combines all lanes of v[i].
template <class Combine>
SEFI_INLINE Vec across(Vec (&v)[16], const Combine& combine) {
    Vec pairs[8], fours[4], halves[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)v[i], b = (__m512)v[i + 8];
        // Lanes of a in the lower halves, of b in the upper ones.
        pairs[i] = combine((Vec)_mm512_shuffle_f32x4(a, b, 0x44), (Vec)_mm512_shuffle_f32x4(a, b, 0xee));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = (__m512)pairs[i], b = (__m512)pairs[i + 4];
        fours[i] = combine((Vec)_mm512_shuffle_f32x4(a, b, 0x88), (Vec)_mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512 a = (__m512)fours[i], b = (__m512)fours[i + 2];
        halves[i] = combine((Vec)_mm512_shuffle_ps(a, b, 0x44), (Vec)_mm512_shuffle_ps(a, b, 0xee));
    }
    const __m512 a = (__m512)halves[0], b = (__m512)halves[1];
    const Vec all = combine((Vec)_mm512_shuffle_ps(a, b, 0x88), (Vec)_mm512_shuffle_ps(a, b, 0xdd));
    // Part p, lane l hold row 8 (p % 2) + 4 (p / 2) + 2 (l % 2) + l / 2 of what came.
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Vec)_mm512_permutexvar_ps(order, (__m512)all);
}

SEFI_INLINE Vec sum_across(Vec (&v)[16]) {
    return across(v, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}

SEFI_INLINE Vec most_across(Vec (&v)[16]) {
    return across(v, [](Vec a, Vec b) __attribute__((always_inline)) { return max(a, b); });
}

// Scores of 16 rows to probabilities before division by their sum, in place, zeros behind the keys;
// inverse gets one over the sums. kVectors is keys.vectors, or 0 for any number.
template <int kVectors>
inline void softmax_rows(float* scores, int64_t stride, const KeyLanes& keys, float factor,
                         float* inverse, Ahead& ahead) {
    const int64_t vectors = kVectors ? kVectors : keys.vectors;
    Vec rows[16];
    for (int r = 0; r < 16; ++r) {
        const float* row = scores + r * stride;
        const int64_t end = vectors - 1;
        Vec most = (Vec)_mm512_mask_loadu_ps((__m512)broadcast(-__builtin_inff()), keys.last,
                                             row + end * kLanes);
#pragma GCC unroll 8
        for (int64_t v = 0; v < end; ++v) most = max(most, load(row + v * kLanes));
        rows[r] = most;
    }
    float most[16];
    store(most, most_across(rows));
    for (int r = 0; r < 16; ++r) {
        float* row = scores + r * stride;
        if (r % 4 == 0) ahead.step();
        if (r % 8 == 0) keep_awake();
        Vec total{};
#pragma GCC unroll 8
        for (int64_t v = 0; v < vectors; ++v) {
            Vec p = exp2(factor * (load(row + v * kLanes) - broadcast(most[r])));
            if (v + 1 == vectors) p = (Vec)_mm512_maskz_mov_ps(keys.last, (__m512)p);
            total += p;
            store(row + v * kLanes, p);
        }
        rows[r] = total;
    }
    store(inverse, 1.0f / sum_across(rows));
}

inline void softmax_rows(float* scores, int64_t stride, const KeyLanes& keys, float factor,
                         float* inverse, Ahead& ahead) {
    // 77 text tokens.
    if (keys.vectors == 5) {
        softmax_rows<5>(scores, stride, keys, factor, inverse, ahead);
    } else {
        softmax_rows<0>(scores, stride, keys, factor, inverse, ahead);
    }
}

}  // namespace SEFI_ISA
}  // namespace sefi
