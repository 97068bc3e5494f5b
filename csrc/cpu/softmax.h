// Scores and probabilities of one tile: keys down, query rows along the lanes.
#pragma once

#include "cpu/product.h"
#include "cpu/scratch.h"

namespace sefi {
namespace SEFI_ISA {

// softmax(scale * s) = 2**(factor * (sign * s - most)): the maximum is sought before scaling, which
// is right for a positive factor only, so the sign goes into the query. Scaling the query by the
// whole factor would save a product and break the accuracy rule: its rounding meets large scores.
struct ScoreScale {
    float sign, factor;
    explicit ScoreScale(float scale)
        : sign(scale < 0 ? -1.0f : 1.0f), factor(sign * scale * 1.44269504088896341f) {}
};

// A vector for each J, by value, so that a block of a product can hold it in registers.
template <int J>
struct Vectors {
    Vec of[J];
};

// Probabilities before division by their sum, [keys, J * kLanes], and one over the sums.
//
// `columns` is the tile's query rows as columns, times the scale's sign.
template <int J>
inline void softmax_tile(const Rows& key, int64_t keys, int64_t head_dim, const float* columns,
                         float factor, float* tile, Vec (&inverse)[J], Ahead& ahead) {
    constexpr int64_t kRows = J * kLanes;
    Vectors<J> most;
    for (Vec& v : most.of) v = broadcast(-__builtin_inff());
    product<J, Scalars::along_rows>(
        keys, key.data, key.stride, columns, kRows, head_dim, most,
        [=](int64_t m, const Vec (&scores)[J], Vectors<J>& most) __attribute__((always_inline)) {
            for (int j = 0; j < J; ++j) {
                store(tile + m * kRows + j * kLanes, scores[j]);
                most.of[j] = max(most.of[j], scores[j]);
            }
        },
        &ahead);
    Vec total[J] = {};
    for (int64_t m = 0; m < keys; ++m) {
        for (int j = 0; j < J; ++j) {
            float* at = tile + m * kRows + j * kLanes;
            const Vec p = exp2(factor * (load(at) - most.of[j]));
            total[j] += p;
            store(at, p);
        }
    }
    for (int j = 0; j < J; ++j) inverse[j] = 1.0f / total[j];
}

}  // namespace SEFI_ISA
}  // namespace sefi
