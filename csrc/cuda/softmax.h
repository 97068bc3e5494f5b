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

// softmax(rows * tile^T) over the keys. log_sum: log2 of each row's sum of powers, +inf for a row
// without any key, whose probabilities are zeros.
template <int D, class E>
SEFI_DEVICE void probabilities(const uint32_t (&rows)[D / 8][2], uint32_t tile, const float* bias,
                               float scale_log2, float (&map)[kKeyEights][4],
                               float (&log_sum)[2]) {
#pragma unroll
    for (int e = 0; e < kKeyEights; ++e) {
        const float2 start = of_columns(bias, e);
        map[e][0] = map[e][2] = start.x;
        map[e][1] = map[e][3] = start.y;
    }
    multiply_keys<D, E>(rows, tile, map);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float peak = -INFINITY;
#pragma unroll
        for (int e = 0; e < kKeyEights; ++e) {
            peak = fmaxf(peak, fmaxf(map[e][2 * r], map[e][2 * r + 1]));
        }
        peak = row_max(peak);
        const float shift = peak == -INFINITY ? 0.0f : peak * scale_log2;
        float total = 0.0f;
#pragma unroll
        for (int e = 0; e < kKeyEights; ++e) {
#pragma unroll
            for (int i = 2 * r; i < 2 * r + 2; ++i) {
                map[e][i] = power_of_two(fmaf(map[e][i], scale_log2, -shift));
                total += map[e][i];
            }
        }
        total = row_sum(total);
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        log_sum[r] = total == 0.0f ? INFINITY : shift + log2f(total);
#pragma unroll
        for (int e = 0; e < kKeyEights; ++e) {
            map[e][2 * r] *= inverse;
            map[e][2 * r + 1] *= inverse;
        }
    }
}

}  // namespace sefi::cuda::tensor
