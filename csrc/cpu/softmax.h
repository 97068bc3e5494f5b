// Softmax of one tile: keys are its rows, query rows lie along the lanes.
#pragma once

#include "cpu/matmul.h"
#include "cpu/unit.h"

namespace sefi {
namespace SEFI_ISA {

// A probability before division is 2**(sm_scale_log2 * (sign * score - row_max)). The maximum is
// taken before scaling, which needs a positive factor, so the sign goes into the query. To scale
// the query by the whole factor would break the accuracy rule, because its rounding errors grow
// with the scores.
struct ScoreScale {
    float sign, sm_scale_log2;
    explicit ScoreScale(float scale)
        : sign(scale < 0 ? -1.0f : 1.0f), sm_scale_log2(sign * scale * 1.44269504088896341f) {}
};

// J vectors by value, so that a block of a product keeps them in registers.
template <int J>
struct Vectors {
    Vec of[J];
};

// Compute probabilities before division by their sum, [keys, J * kLanes], and one over the sums.
// `columns` are the query rows of the tile as columns, times the sign of the scale.
template <int J>
inline void softmax_tile(const Rows& key, int64_t keys, int64_t head_dim, const float* columns,
                         float sm_scale_log2, float* tile, Vec (&inv_sum)[J],
                         Prefetcher& prefetcher) {
    constexpr int64_t kRows = J * kLanes;
    Vectors<J> row_max;
    for (Vec& v : row_max.of) v = broadcast(-__builtin_inff());
    product<J, Scalars::along_rows>(
        keys, key.data, key.stride, columns, kRows, head_dim, row_max,
        [=](int64_t m, const Vec(&scores)[J], Vectors<J>& row_max) __attribute__((always_inline)) {
            for (int j = 0; j < J; ++j) {
                store(tile + m * kRows + j * kLanes, scores[j]);
                row_max.of[j] = max(row_max.of[j], scores[j]);
            }
        },
        &prefetcher);
    Vec total[J] = {};
    for (int64_t m = 0; m < keys; ++m) {
        for (int j = 0; j < J; ++j) {
            float* at = tile + m * kRows + j * kLanes;
            const Vec p = exp2(sm_scale_log2 * (load(at) - row_max.of[j]));
            total[j] += p;
            store(at, p);
        }
    }
    for (int j = 0; j < J; ++j) inv_sum[j] = 1.0f / total[j];
}

}  // namespace SEFI_ISA
}  // namespace sefi
