// Backward of the softmax of 16 query rows in the registers of a warp.
#pragma once

#include "cuda/softmax.h"

namespace sefi::cuda::mma {

// Replace A_r by the gradient of the subject loss with respect to A_t.
template <int kN8>
SEFI_DEVICE void loss_gradient(const float (&probs)[kN8][4], const float* loss_factor,
                               float (&ref_probs)[kN8][4]) {
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
        const float2 factor = of_columns(loss_factor, n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            ref_probs[n][i] = (i % 2 ? factor.y : factor.x) * (probs[n][i] - ref_probs[n][i]);
        }
    }
}

// Add the gradient of one column of probabilities.
template <int kN8>
SEFI_DEVICE void add_probs_grad(float (&d_probs)[kN8][4], int64_t position, float share, int first,
                                int end, const float* gradient) {
    if (position < 0 || position >= 8 * kN8 || int(position) % 8 / 2 != lane() % 4) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane() / 4 + 8 * r;
        const float added = row < end ? share * gradient[row] : 0.0f;
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
            // Added to every n8: an index known only at run time would move d_probs to memory.
            const bool here = int(position) / 8 == n;
            d_probs[n][2 * r] += here && position % 2 == 0 ? added : 0.0f;
            d_probs[n][2 * r + 1] += here && position % 2 == 1 ? added : 0.0f;
        }
    }
}

// Add the gradients of all chosen columns. `first_key` is the key of column 0 of d_probs.
template <int kN8>
SEFI_DEVICE void add_probs_grads(const BwdParams& a, int64_t b, int first, int end, int first_key,
                                 float (&d_probs)[kN8][4]) {
    const BackwardCall& call = a.call;
    const int64_t probs_head = call.probs_all_heads ? int64_t(blockIdx.x) : b;
    for (int64_t t = 0; call.grad_attn_probs && t < call.probs_count; ++t) {
        const int64_t position =
            call.probs_positions[b * call.probs_positions_batch + t] - first_key;
        add_probs_grad(d_probs, position, a.probs_grad_share, first, end,
                       call.grad_attn_probs + (probs_head * call.probs_count + t) * call.queries);
    }
}

// delta = rowsum(probs * d_probs) of both rows.
template <int kN8>
SEFI_DEVICE void row_delta(const float (&probs)[kN8][4], const float (&d_probs)[kN8][4],
                           float (&delta)[2]) {
    float even[2] = {}, odd[2] = {};
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            even[r] = fmaf(probs[n][2 * r], d_probs[n][2 * r], even[r]);
            odd[r] = fmaf(probs[n][2 * r + 1], d_probs[n][2 * r + 1], odd[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) delta[r] = quad_sum(even[r] + odd[r]);
}

// Turn gradients of probabilities into gradients of scores (equation 8 of docs/method.md).
template <int kN8>
SEFI_DEVICE void softmax_backward(const float (&probs)[kN8][4], const float (&delta)[2],
                                  float (&d_probs)[kN8][4]) {
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d_probs[n][i] = probs[n][i] * (d_probs[n][i] - delta[i / 2]);
    }
}

}  // namespace sefi::cuda::mma
