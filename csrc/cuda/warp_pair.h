// Pairs of adjacent warps that share 16 query rows. Each warp has half of the keys.
#pragma once

#include "cuda/softmax.h"

namespace sefi::cuda::mma {

// Exchange of row statistics through shared memory.
class WarpPair {
    static constexpr int kRows = 16, kSoftmaxes = 2;

public:
    // From both warps for each row: shift and row_sum of each softmax, and delta.
    static constexpr int kBytes = 2 * kRows * (8 * kSoftmaxes + 4);

    // `memory` has kBytes for each pair of the block.
    SEFI_DEVICE explicit WarpPair(char* memory)
        : numbers_(reinterpret_cast<float2*>(memory + int(threadIdx.x) / 64 * kBytes)),
          delta_(reinterpret_cast<float*>(numbers_ + 2 * kRows * kSoftmaxes)),
          row_(int(threadIdx.x) / 32 % 2 * kRows + lane() / 4) {}

    // Turn scores into probabilities among the keys of both warps, with one barrier.
    template <class... Softmaxes>
    SEFI_DEVICE void normalize(float sm_scale_log2, Softmaxes&... softmaxes) const {
        const auto each = [&](const auto& step) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int place = row_ + 8 * r;
                ((step(softmaxes, r, place), place += 2 * kRows), ...);
            }
        };
        each([&](auto& one, int r, int) { one.template find_shift<false>(r, sm_scale_log2); });
        each([&](auto& one, int r, int place) {
            one.find_powers(r, sm_scale_log2);
            if (lane() % 4 == 0) numbers_[place] = one.half(r);
        });
        sync_warp_pair();
        each([&](auto& one, int r, int place) { one.divide(r, numbers_[place ^ kRows]); });
    }

    // Sum delta over both halves of the keys: put, a barrier of the caller, add.
    SEFI_DEVICE void put(const float (&delta)[2]) const {
        if (lane() % 4) return;
        delta_[row_] = delta[0];
        delta_[row_ + 8] = delta[1];
    }
    SEFI_DEVICE void add(float (&delta)[2]) const {
        const int other = row_ ^ kRows;
        delta[0] += delta_[other];
        delta[1] += delta_[other + 8];
    }

private:
    float2* const numbers_;
    float* const delta_;
    const int row_;
};

// Store factors * weights * tile for the 16 rows of a pair; each warp stores half of the columns.
// `probs` is the address of the weights in shared memory, `tile` an address with sum_offset.
template <int D, class E>
SEFI_DEVICE void store_half_sum(float2 factors, const Rows& head, int first, int end,
                                uint32_t probs, uint32_t tile) {
    static_assert(D % 64 == 32, "an odd number of groups of 32 columns");
    constexpr int kWhole = D / 64;  // groups per warp, plus half of the last one
    uint32_t weights[kKeySteps][4];
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
        const int from = lane() % 16 * kProbsStride + lane() / 16 * 16;
        ldmatrix(weights[k], probs + uint32_t(from + 32 * k));
    }
    const int half = int(threadIdx.x) / 32 % 2, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < kWhole; ++i) {
        const int group = kWhole * half + i;
        float sums[4][4] = {};
        add_weighted_rows<D, E>(weights, tile + uint32_t(64 * group), sums);
        store_n8<E>(head, 32 * group + 8 * t, first, end, factors, sums);
    }
    float sums[2][4] = {};
    add_weighted_rows<D, E>(weights, tile + uint32_t(128 * kWhole + 32 * half), sums);
    store_n8<E>(head, 64 * kWhole + 8 * t + 4 * half, first, end, factors, sums);
}

}  // namespace sefi::cuda::mma
