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

template <int kEights>
SEFI_DEVICE void clear(float (&map)[kEights][4]) {
#pragma unroll
    for (int i = 0; i < 4 * kEights; ++i) map[i / 4][i % 4] = 0.0f;
}

// 0 for the keys of a tile that a sample may attend to, -inf for the others.
struct Bias {
    const float* keys;
    // The usual call hides none of them but in the last eight, which may lie past the last key.
    bool only_last;

    template <int kEights>
    SEFI_DEVICE void add(float (&map)[kEights][4]) const {
        if (!only_last) {
#pragma unroll
            for (int e = 0; e + 1 < kEights; ++e) add(e, map[e]);
        }
        add(kEights - 1, map[kEights - 1]);
    }

    // Whether more than one key can be attended to.
    SEFI_DEVICE bool shows_several() const {
        if (only_last) return true;
        float shown = 0.0f;
#pragma unroll
        for (int e = 0; e < kKeyEights; ++e) {
            const float2 own = of_columns(keys, e);
            shown += (own.x == 0.0f ? 1.0f : 0.0f) + (own.y == 0.0f ? 1.0f : 0.0f);
        }
        return row_sum(shown) > 1.0f;
    }

private:
    SEFI_DEVICE void add(int eight, float (&scores)[4]) const {
        const float2 own = of_columns(keys, eight);
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[i] += i % 2 ? own.y : own.x;
    }
};

SEFI_DEVICE bool hides_only_last(const Problem& p) { return !p.key_mask && p.keys > kKeys - 8; }

// rows * tile^T, and -inf for keys that no row may attend to. `tile` is the tile's address with
// score_offset.
template <int D, class E, int kEights>
SEFI_DEVICE void score_keys(const uint32_t (&rows)[D / 8][2], uint32_t tile, const Bias& bias,
                            float (&map)[kEights][4]) {
    clear(map);
    multiply_keys<D, E>(rows, tile, map);
    bias.add(map);
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

    // kCentred: the powers are to be used as they are, and the rounding of a large shift would make
    // the greatest of them any number but 1; then the scores are shifted instead.
    template <bool kCentred>
    SEFI_DEVICE void find_shift(int r, float scale_log2) {
        float peak = -INFINITY;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            peak = fmaxf(peak, fmaxf(map[e][2 * r], map[e][2 * r + 1]));
        }
        peak = row_max(peak);
        shift[r] = peak == -INFINITY ? 0.0f : peak * scale_log2;
        if (kCentred && fabsf(shift[r]) > 1048576.0f) {
            shift[r] = 0.0f;
#pragma unroll
            for (int e = 0; e < kEights; ++e) {
                map[e][2 * r] -= peak;
                map[e][2 * r + 1] -= peak;
            }
        }
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

    // What makes probabilities of a row's powers.
    SEFI_DEVICE float inverse(int r) const {
        return total[r] == 0.0f ? 0.0f : reciprocal(total[r]);
    }

    SEFI_DEVICE void divide(int r) { scale(r, inverse(r)); }

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

template <class Step, class... Maps>
SEFI_DEVICE void for_rows(const Step& step, Maps&... softmaxes) {
#pragma unroll
    for (int r = 0; r < 2; ++r) (step(softmaxes, r), ...);
}

// Scores to powers; a row without any key becomes zeros. Two maps at once wait for each other's
// latencies instead of their own.
template <bool kCentred, class... Maps>
SEFI_DEVICE void find_powers(float scale_log2, Maps&... softmaxes) {
    const auto shift = [&](auto& one, int r) { one.template find_shift<kCentred>(r, scale_log2); };
    for_rows(shift, softmaxes...);
    for_rows([&](auto& one, int r) { one.find_powers(r, scale_log2); }, softmaxes...);
}

// Scores to probabilities.
template <class... Maps>
SEFI_DEVICE void normalise(float scale_log2, Maps&... softmaxes) {
    find_powers<false>(scale_log2, softmaxes...);
    for_rows([&](auto& one, int r) { one.divide(r); }, softmaxes...);
}

}  // namespace sefi::cuda::tensor
