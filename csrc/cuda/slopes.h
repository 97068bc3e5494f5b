// Gradients of the probabilities of 16 query rows in a warp's registers, and what dQ gets of them.
#pragma once

#include "cuda/softmax.h"

namespace sefi::cuda::tensor {

// What the subject loss adds to the gradients of A_t's probabilities, in the place of A_r's.
template <int kEights>
SEFI_DEVICE void pull_to_reference(const float (&target)[kEights][4], const float* pull,
                                   float (&anchor)[kEights][4]) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
        const float2 factor = of_columns(pull, e);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            anchor[e][i] = (i % 2 ? factor.y : factor.x) * (target[e][i] - anchor[e][i]);
        }
    }
}

// Adds one chosen column's gradient.
template <int kEights>
SEFI_DEVICE void add_map(float (&slope)[kEights][4], int64_t token, float share, int first,
                         int end, const float* gradient) {
    if (token < 0 || token >= 8 * kEights || int(token) % 8 / 2 != lane() % 4) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane() / 4 + 8 * r;
        const float added = row < end ? share * gradient[row] : 0.0f;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            // Added everywhere: an index known only at run time would move the map to memory.
            const bool here = int(token) / 8 == e;
            slope[e][2 * r] += here && token % 2 == 0 ? added : 0.0f;
            slope[e][2 * r + 1] += here && token % 2 == 1 ? added : 0.0f;
        }
    }
}

// Adds the gradients of all chosen columns of head h of sample b. `first_key`: of the map.
template <int kEights>
SEFI_DEVICE void add_maps(const BackwardArguments& a, int64_t b, int first, int end,
                          int first_key, float (&slope)[kEights][4]) {
    const BackwardCall& call = a.call;
    const int64_t map = call.probs_all_heads ? int64_t(blockIdx.x) : b;
    for (int64_t t = 0; call.grad_attn_probs && t < call.probs_count; ++t) {
        const int64_t token = call.probs_positions[b * call.probs_positions_batch + t] - first_key;
        add_map(slope, token, a.map_share, first, end,
                call.grad_attn_probs + (map * call.probs_count + t) * call.queries);
    }
}

// rowsum(map * slope) of both rows.
template <int kEights>
SEFI_DEVICE void row_means(const float (&map)[kEights][4], const float (&slope)[kEights][4],
                           float (&means)[2]) {
    float even[2] = {}, odd[2] = {};
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            even[r] = fmaf(map[e][2 * r], slope[e][2 * r], even[r]);
            odd[r] = fmaf(map[e][2 * r + 1], slope[e][2 * r + 1], odd[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) means[r] = row_sum(even[r] + odd[r]);
}

// Gradients of probabilities to those of scores (equation 8 of docs/method.md).
template <int kEights>
SEFI_DEVICE void through_softmax(const float (&map)[kEights][4], const float (&means)[2],
                                 float (&slope)[kEights][4]) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) slope[e][i] = map[e][i] * (slope[e][i] - means[i / 2]);
    }
}

}  // namespace sefi::cuda::tensor
