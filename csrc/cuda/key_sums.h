// Sums over query rows: of 80 keys by all columns of a head, as the warps of a block share them.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

// The partial sums of a warp's keys and columns, times a factor.
template <int D, int kEights>
SEFI_DEVICE void store_sums(const float (&sums)[kEights][4], float factor, int64_t keys, int tile,
                            float* to) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int key = 16 * tile + lane() / 4 + 8 * r;
        if (key >= keys) continue;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            *reinterpret_cast<float2*>(to + key * D + 8 * e + 2 * (lane() % 4)) =
                make_float2(factor * sums[e][2 * r], factor * sums[e][2 * r + 1]);
        }
    }
}

// A warp sums two of the first four tiles of 16 keys by one group of columns, and the fifth tile by
// half of these: so each matrix it reads is a factor of two or three products. The last groups and
// halves overlap where the columns are no multiple of them.
template <int D, int kWarps>
class KeySums {
    static constexpr int kGroups = kWarps / 2;
    static constexpr int kEights = (Layout<D>::kEights + kGroups - 1) / kGroups;
    static constexpr int kShare = (kEights + 1) / 2;

public:
    // Adds map^T * tile: kRows rows of a map at `map` and of a tile at `rows`, in shared memory.
    template <class E, int kRows>
    SEFI_DEVICE void add(uint32_t map, uint32_t rows) {
        map += uint32_t((lane() / 16 * 8 + lane() % 8) * kMapStride + lane() / 8 % 2 * 16);
        rows += sum_offset<D>() + uint32_t(16 * first_eight());
#pragma unroll
        for (int chunk = 0; chunk < kRows / 16; ++chunk) {
            uint32_t b[kEights][2], a[4];
            load_eights(rows + uint32_t(16 * chunk * Layout<D>::kStride), b);
            const uint32_t keys = map + uint32_t(16 * chunk * kMapStride);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_transposed(a, keys + uint32_t(32 * (2 * side() + i)));
#pragma unroll
                for (int e = 0; e < kEights; ++e) multiply_add<E>(own_[i][e], a, b[e][0], b[e][1]);
            }
            load_transposed(a, keys + 32 * 4);
#pragma unroll
            for (int e = 0; e < kShare; ++e) {
                const auto &left = b[e], &right = b[kEights - kShare + e];
                multiply_add<E>(fifth_[e], a, side() ? right[0] : left[0],
                                side() ? right[1] : left[1]);
            }
        }
    }

    // factor * sums as float32 of [keys, D].
    SEFI_DEVICE void store(float factor, int64_t keys, float* to) const {
        to += 8 * first_eight();
        store_sums<D>(own_[0], factor, keys, 2 * side(), to);
        store_sums<D>(own_[1], factor, keys, 2 * side() + 1, to);
        store_sums<D>(fifth_, factor, keys, 4, to + (side() ? 8 * (kEights - kShare) : 0));
    }

private:
    static SEFI_DEVICE int side() { return int(threadIdx.x) / 32 % 2; }
    static SEFI_DEVICE int first_eight() {
        return min(int(threadIdx.x) / 64 * kEights, Layout<D>::kEights - kEights);
    }

    float own_[2][kEights][4] = {}, fifth_[kShare][4] = {};
};

}  // namespace sefi::cuda::tensor
