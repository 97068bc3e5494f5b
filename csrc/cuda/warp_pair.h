// Two neighbouring warps that have the same 16 query rows and half of the keys each.
#pragma once

#include "cuda/softmax.h"

namespace sefi::cuda::tensor {

// What the two tell each other of their rows, through shared memory.
class WarpPair {
    static constexpr int kRows = 16, kMaps = 2;

public:
    // Of each row, from both warps: a shift and a total for each map, and a mean.
    static constexpr int kBytes = 2 * kRows * (8 * kMaps + 4);

    // `memory`: kBytes for each pair of the block.
    SEFI_DEVICE explicit WarpPair(char* memory)
        : numbers_(reinterpret_cast<float2*>(memory + int(threadIdx.x) / 64 * kBytes)),
          means_(reinterpret_cast<float*>(numbers_ + 2 * kRows * kMaps)),
          row_(int(threadIdx.x) / 32 % 2 * kRows + lane() / 4) {}

    // As tensor::normalise, over the keys of both. The two meet once.
    template <class... Maps>
    SEFI_DEVICE void normalise(float scale_log2, Maps&... softmaxes) const {
        const auto each = [&](const auto& step) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int place = row_ + 8 * r;
                ((step(softmaxes, r, place), place += 2 * kRows), ...);
            }
        };
        each([&](auto& one, int r, int) { one.template find_shift<false>(r, scale_log2); });
        each([&](auto& one, int r, int place) {
            one.find_powers(r, scale_log2);
            if (lane() % 4 == 0) numbers_[place] = one.half(r);
        });
        meet_neighbour();
        each([&](auto& one, int r, int place) { one.divide(r, numbers_[place ^ kRows]); });
    }

    // Means over half of the keys become those over all: put, meet, add.
    SEFI_DEVICE void put(const float (&means)[2]) const {
        if (lane() % 4) return;
        means_[row_] = means[0];
        means_[row_ + 8] = means[1];
    }
    SEFI_DEVICE void add(float (&means)[2]) const {
        const int other = row_ ^ kRows;
        means[0] += means_[other];
        means[1] += means_[other + 8];
    }

private:
    float2* const numbers_;
    float* const means_;
    const int row_;
};

// map * tile times factors for the pair's 16 rows, half of the columns each. `map`: the address of
// the rows' map in shared memory; `tile` with sum_offset.
template <int D, class E>
SEFI_DEVICE void write_half(float2 factors, const Rows& head, int first, int end, uint32_t map,
                            uint32_t tile) {
    static_assert(D % 64 == 32, "an odd number of groups of 32 columns");
    constexpr int kWhole = D / 64;  // groups a warp, and half of the last one
    uint32_t weights[kKeySteps][4];
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
        const int from = lane() % 16 * kMapStride + lane() / 16 * 16;
        load_matrices(weights[k], map + uint32_t(from + 32 * k));
    }
    const int half = int(threadIdx.x) / 32 % 2, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < kWhole; ++i) {
        const int group = kWhole * half + i;
        float sums[4][4] = {};
        weigh_keys<D, E>(weights, tile + uint32_t(64 * group), sums);
        store_eights<E>(head, 32 * group + 8 * t, first, end, factors, sums);
    }
    float sums[2][4] = {};
    weigh_keys<D, E>(weights, tile + uint32_t(128 * kWhole + 32 * half), sums);
    store_eights<E>(head, 64 * kWhole + 8 * t + 4 * half, first, end, factors, sums);
}

}  // namespace sefi::cuda::tensor
