// Softmax of 16 query rows in the registers of a warp. A row lies in the four lanes of a quad.
#pragma once

#include "cuda/mma_tile.h"

namespace sefi::cuda::mma {

SEFI_DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

SEFI_DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Two entries of a per-key array: those of the columns of a lane.
SEFI_DEVICE float2 of_columns(const float* keys, int n8) {
    return *reinterpret_cast<const float2*>(keys + 8 * n8 + 2 * (lane() % 4));
}

template <int kN8>
SEFI_DEVICE void clear(float (&values)[kN8][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kN8; ++i) values[i / 4][i % 4] = 0.0f;
}

// 0 for the visible keys of a tile, -inf for the hidden ones.
struct Bias {
    const float* keys;
    // Without a mask only the last n8 has keys to hide: those past the last key.
    bool only_last;

    template <int kN8>
    SEFI_DEVICE void add(float (&scores)[kN8][4]) const {
        if (!only_last) {
#pragma unroll
            for (int n = 0; n + 1 < kN8; ++n) add(n, scores[n]);
        }
        add(kN8 - 1, scores[kN8 - 1]);
    }

    // Whether more than one key is visible.
    SEFI_DEVICE bool shows_several() const {
        if (only_last) return true;
        float shown = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyN8; ++n) {
            const float2 own = of_columns(keys, n);
            shown += (own.x == 0.0f ? 1.0f : 0.0f) + (own.y == 0.0f ? 1.0f : 0.0f);
        }
        return quad_sum(shown) > 1.0f;
    }

private:
    SEFI_DEVICE void add(int n8, float (&scores)[4]) const {
        const float2 own = of_columns(keys, n8);
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i] += i % 2 ? own.y : own.x;
    }
};

SEFI_DEVICE bool hides_only_last(const Problem& p) { return !p.key_mask && p.keys > kKeys - 8; }

// scores = rows * tile^T, -inf for hidden keys. `tile` is an address with score_offset.
template <int D, class E, int kN8>
SEFI_DEVICE void score_keys(const uint32_t (&rows)[D / 8][2], uint32_t tile, const Bias& bias,
                            float (&scores)[kN8][4]) {
    clear(scores);
    multiply_keys<D, E>(rows, tile, scores);
    bias.add(scores);
}

// Scores that become probabilities in place, with the statistics of the two rows of a lane.
template <int kN8>
struct Softmax {
    float (&probs)[kN8][4];
    float shift[2], row_sum[2];

    SEFI_DEVICE explicit Softmax(float (&scores)[kN8][4]) : probs(scores) {}

    // Base-2 logsumexp; +inf for a row without a visible key.
    SEFI_DEVICE float lse(int r) const {
        return row_sum[r] == 0.0f ? INFINITY : shift[r] + log2f(row_sum[r]);
    }

    // kCentered: the largest power must be 1. If rounding of a large shift would prevent that, the
    // scores are shifted instead.
    template <bool kCentered>
    SEFI_DEVICE void find_shift(int r, float sm_scale_log2) {
        float row_max = -INFINITY;
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
            row_max = fmaxf(row_max, fmaxf(probs[n][2 * r], probs[n][2 * r + 1]));
        }
        row_max = quad_max(row_max);
        shift[r] = row_max == -INFINITY ? 0.0f : row_max * sm_scale_log2;
        if (kCentered && fabsf(shift[r]) > 1048576.0f) {
            shift[r] = 0.0f;
#pragma unroll
            for (int n = 0; n < kN8; ++n) {
                probs[n][2 * r] -= row_max;
                probs[n][2 * r + 1] -= row_max;
            }
        }
    }

    SEFI_DEVICE void find_powers(int r, float sm_scale_log2) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
            float &x = probs[n][2 * r], &y = probs[n][2 * r + 1];
            x = exp2_approx(fmaf(x, sm_scale_log2, -shift[r]));
            y = exp2_approx(fmaf(y, sm_scale_log2, -shift[r]));
            even += x;
            odd += y;
        }
        row_sum[r] = quad_sum(even + odd);
    }

    // Factor that turns the powers of a row into probabilities.
    SEFI_DEVICE float inv_sum(int r) const {
        return row_sum[r] == 0.0f ? 0.0f : rcp_approx(row_sum[r]);
    }

    SEFI_DEVICE void divide(int r) { scale(r, inv_sum(r)); }

    // Shift and row_sum, for the warp that has the other half of the keys.
    SEFI_DEVICE float2 half(int r) const {
        return make_float2(row_sum[r] == 0.0f ? -INFINITY : shift[r], row_sum[r]);
    }

    // Probabilities among the keys of both halves.
    SEFI_DEVICE void divide(int r, float2 other) {
        const float2 own = half(r);
        const float row_max = fmaxf(own.x, other.x), joint = row_max == -INFINITY ? 0.0f : row_max;
        const float rescale = exp2_approx(own.x - joint);
        // Both warps compute the same bits.
        const float all = mul_rn(own.y, rescale) + mul_rn(other.y, exp2_approx(other.x - joint));
        scale(r, all == 0.0f ? 0.0f : rescale * rcp_approx(all));
    }

private:
    SEFI_DEVICE void scale(int r, float inv_sum) {
        // Not fused with a later addition: equal scores must give equal probabilities.
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
            probs[n][2 * r] = mul_rn(probs[n][2 * r], inv_sum);
            probs[n][2 * r + 1] = mul_rn(probs[n][2 * r + 1], inv_sum);
        }
    }
};

template <class Step, class... Softmaxes>
SEFI_DEVICE void for_rows(const Step& step, Softmaxes&... softmaxes) {
#pragma unroll
    for (int r = 0; r < 2; ++r) (step(softmaxes, r), ...);
}

// Turn scores into powers; a row without a visible key becomes zeros. Interleaving two softmaxes
// hides the latencies of each.
template <bool kCentered, class... Softmaxes>
SEFI_DEVICE void find_powers(float sm_scale_log2, Softmaxes&... softmaxes) {
    const auto shift = [&](auto& one, int r) {
        one.template find_shift<kCentered>(r, sm_scale_log2);
    };
    for_rows(shift, softmaxes...);
    for_rows([&](auto& one, int r) { one.find_powers(r, sm_scale_log2); }, softmaxes...);
}

// Turn scores into probabilities.
template <class... Softmaxes>
SEFI_DEVICE void normalize(float sm_scale_log2, Softmaxes&... softmaxes) {
    find_powers<false>(sm_scale_log2, softmaxes...);
    for_rows([&](auto& one, int r) { one.divide(r); }, softmaxes...);
}

}  // namespace sefi::cuda::mma
