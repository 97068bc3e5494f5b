// Probabilities of 16 rows in a warp's registers; a row lies in four neighbouring lanes.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

SEFI_DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

SEFI_DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The keys' values of one number a key, as a lane's columns need them.
SEFI_DEVICE float2 of_columns(const float* keys, int eight) {
    return *reinterpret_cast<const float2*>(keys + 8 * eight + 2 * (lane() % 4));
}

// rows * tile^T, and -inf for keys that no row may attend to. `tile` is the tile's address with
// score_offset.
template <int D, class E, int kEights>
SEFI_DEVICE void score_keys(const uint32_t (&rows)[D / 8][2], uint32_t tile, const float* bias,
                            float (&map)[kEights][4]) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
        const float2 start = of_columns(bias, e);
        map[e][0] = map[e][2] = start.x;
        map[e][1] = map[e][3] = start.y;
    }
    multiply_keys<D, E>(rows, tile, map);
}

// A map that becomes probabilities, and what a lane knows of its two rows.
template <int kEights>
struct Softmax {
    float (&map)[kEights][4];
    float shift[2], total[2];

    SEFI_DEVICE explicit Softmax(float (&scores)[kEights][4]) : map(scores) {}

    // log2 of a row's sum of powers, +inf for a row without any key.
    SEFI_DEVICE float log_sum(int r) const {
        return total[r] == 0.0f ? INFINITY : shift[r] + log2f(total[r]);
    }

    SEFI_DEVICE void find_shift(int r, float scale_log2) {
        float peak = -INFINITY;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            peak = fmaxf(peak, fmaxf(map[e][2 * r], map[e][2 * r + 1]));
        }
        peak = row_max(peak);
        shift[r] = peak == -INFINITY ? 0.0f : peak * scale_log2;
    }

    SEFI_DEVICE void find_powers(int r, float scale_log2) {
        float even = 0.0f, odd = 0.0f;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            float &x = map[e][2 * r], &y = map[e][2 * r + 1];
            x = power_of_two(fmaf(x, scale_log2, -shift[r]));
            y = power_of_two(fmaf(y, scale_log2, -shift[r]));
            even += x;
            odd += y;
        }
        total[r] = row_sum(even + odd);
    }

    SEFI_DEVICE void divide(int r) {
        scale(r, total[r] == 0.0f ? 0.0f : reciprocal(total[r]));
    }

    // What the warp needs to know that has the row's other keys: shift and total.
    SEFI_DEVICE float2 half(int r) const {
        return make_float2(total[r] == 0.0f ? -INFINITY : shift[r], total[r]);
    }

    // Probabilities among the keys of both.
    SEFI_DEVICE void divide(int r, float2 other) {
        const float2 own = half(r);
        const float peak = fmaxf(own.x, other.x), joint = peak == -INFINITY ? 0.0f : peak;
        const float toward = power_of_two(own.x - joint);
        // The same in both warps.
        const float all =
            multiply(own.y, toward) + multiply(other.y, power_of_two(other.x - joint));
        scale(r, all == 0.0f ? 0.0f : toward * reciprocal(all));
    }

private:
    SEFI_DEVICE void scale(int r, float inverse) {
        // Not fused with what comes: equal scores of two maps must stay equal.
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            map[e][2 * r] = multiply(map[e][2 * r], inverse);
            map[e][2 * r + 1] = multiply(map[e][2 * r + 1], inverse);
        }
    }
};

// Scores to probabilities; a row without any key becomes zeros. Two maps at once wait for each
// other's latencies instead of their own.
template <class... Maps>
SEFI_DEVICE void normalise(float scale_log2, Maps&... softmaxes) {
    const auto each = [&](const auto& step) {
#pragma unroll
        for (int r = 0; r < 2; ++r) (step(softmaxes, r), ...);
    };
    each([&](auto& one, int r) { one.find_shift(r, scale_log2); });
    each([&](auto& one, int r) { one.find_powers(r, scale_log2); });
    each([&](auto& one, int r) { one.divide(r); });
}

}  // namespace sefi::cuda::tensor
