// Scores and probabilities of one tile: keys down, query rows along the lanes.
#pragma once

#include "cpu/product.h"

namespace sefi {
namespace SEFI_ISA {

// softmax(scale * s) = 2**(factor * (sign * s) - ...): the maximum is sought before scaling, which
// is right for a positive factor only, so the sign goes into the query.
struct ScoreScale {
    float sign, factor;
    explicit ScoreScale(float scale)
        : sign(scale < 0 ? -1.0f : 1.0f), factor((scale < 0 ? -scale : scale) * kLog2e) {}

    static constexpr float kLog2e = 1.44269504088896341f;
};

// Probabilities before division by their sum, [keys, J * kLanes], and one over the sums.
//
// `columns` is the tile's query rows as columns, times the scale's sign.
template <int J>
inline void softmax_tile(const float* packed_keys, int64_t keys, int64_t head_dim,
                         const float* columns, float factor, float* tile, Vec (&inverse)[J],
                         Ahead& ahead) {
    constexpr int64_t kRows = J * kLanes;
    Vec most[J];
    for (Vec& v : most) v = broadcast(-__builtin_inff());
    product<J, Scalars::along_rows>(
        keys, packed_keys, head_dim, columns, kRows, head_dim,
        [&](int64_t m, const Vec (&scores)[J]) __attribute__((always_inline)) {
            for (int j = 0; j < J; ++j) {
                store(tile + m * kRows + j * kLanes, scores[j]);
                most[j] = max(most[j], scores[j]);
            }
        },
        &ahead);
    // Less than 2**-126 of the row's largest probability stays there, and NaN stays NaN.
    const Vec lowest = broadcast(-126.0f / factor);
    Vec total[J] = {};
    for (int64_t m = 0; m < keys; ++m) {
        for (int j = 0; j < J; ++j) {
            float* at = tile + m * kRows + j * kLanes;
            const Vec p = exp2_of_product(max(lowest, load(at) - most[j]), factor);
            total[j] += p;
            store(at, p);
        }
    }
    for (int j = 0; j < J; ++j) inverse[j] = 1.0f / total[j];
}

}  // namespace SEFI_ISA
}  // namespace sefi
