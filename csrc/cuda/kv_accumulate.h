// Sums over query rows: the gradient of 80 keys, distributed among the warps of a block.
#pragma once

#include "cuda/mma_tile.h"

namespace sefi::cuda::mma {

SEFI_DEVICE void store_pair(float first, float second, float* to) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
template <class E>
SEFI_DEVICE void store_pair(float first, float second, E* to) {
    *reinterpret_cast<uint32_t*>(to) = pack<E>(first, second);
}

// Store factor * sums of the keys and columns of a warp. `row` is the stride of a key in elements.
template <class T, int kN8>
SEFI_DEVICE void store_sums(const float (&sums)[kN8][4], float factor, int64_t keys, int tile,
                            T* to, int64_t row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int key = 16 * tile + lane() / 4 + 8 * r;
        if (key >= keys) continue;
        T* const head = to + key * row + 2 * (lane() % 4);
#pragma unroll
        for (int n = 0; n < kN8; ++n) {
            store_pair(factor * sums[n][2 * r], factor * sums[n][2 * r + 1], head + 8 * n);
        }
    }
}

// Call store(to, row) with the place of the sums of a block: among the partial sums, else in the
// gradient, else not at all.
template <int D, class E, class Store>
SEFI_DEVICE void store_gradient(const BwdParams& a, float* partials, const View& gradient,
                                const Store& store) {
    if (partials) {
        const int64_t entry = blockIdx.x * a.split.num_splits + blockIdx.y;
        store(partials + entry * a.call.keys * D, int64_t(D));
    } else if (gradient.data) {
        const unsigned heads = unsigned(a.call.heads);
        store(head_of<E>(gradient, blockIdx.x / heads, blockIdx.x % heads), gradient.row);
    }
}

// A warp sums two of the first four tiles of 16 keys for one group of columns, and the fifth tile
// for half of that group. Each matrix that it loads is then a factor of two or three products. The
// last groups and halves overlap if they do not divide the columns.
template <int D, int kWarps>
class KvAccumulator {
    static constexpr int kGroups = kWarps / 2;
    static constexpr int kN8 = (Layout<D>::kN8 + kGroups - 1) / kGroups;
    static constexpr int kHalf = (kN8 + 1) / 2, kRest = kN8 - kHalf;

public:
    // Add weights^T * tile for kRows rows of both in shared memory.
    template <class E, int kRows>
    SEFI_DEVICE void add(uint32_t weights, uint32_t rows) {
        weights += uint32_t((lane() / 16 * 8 + lane() % 8) * kProbsStride + lane() / 8 % 2 * 16);
        rows += sum_offset<D>();
#pragma unroll
        for (int chunk = 0; chunk < kRows / 16; ++chunk) {
            uint32_t half[kHalf][2], rest[kRest][2], a[4];
            const uint32_t chunk_rows = rows + uint32_t(16 * chunk * Layout<D>::kStride);
            load_n8(chunk_rows + uint32_t(16 * half_n8()), half);
            load_n8(chunk_rows + uint32_t(16 * rest_n8()), rest);
            const uint32_t keys = weights + uint32_t(16 * chunk * kProbsStride);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                ldmatrix_trans(a, keys + uint32_t(32 * (2 * side() + i)));
                multiply<E>(a, half, half_[i]);
                multiply<E>(a, rest, rest_[i]);
            }
            ldmatrix_trans(a, keys + 32 * 4);
            multiply<E>(a, half, fifth_);
        }
    }

    // Store factor * sums as [keys, D].
    template <class T>
    SEFI_DEVICE void store(float factor, int64_t keys, T* to, int64_t row) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            store_sums(half_[i], factor, keys, 2 * side() + i, to + 8 * half_n8(), row);
            store_sums(rest_[i], factor, keys, 2 * side() + i, to + 8 * rest_n8(), row);
        }
        store_sums(fifth_, factor, keys, 4, to + 8 * half_n8(), row);
    }

private:
    static SEFI_DEVICE int side() { return int(threadIdx.x) / 32 % 2; }
    static SEFI_DEVICE int first_n8() {
        return min(int(threadIdx.x) / 64 * kN8, Layout<D>::kN8 - kN8);
    }
    // Halves of the group: of two adjacent warps the first has the fifth tile of the first half.
    static SEFI_DEVICE int half_n8() { return first_n8() + (side() ? kRest : 0); }
    static SEFI_DEVICE int rest_n8() { return first_n8() + (side() ? 0 : kHalf); }

    template <class E, int kCount>
    static SEFI_DEVICE void multiply(const uint32_t (&a)[4], const uint32_t (&b)[kCount][2],
                                     float (&sums)[kCount][4]) {
#pragma unroll
        for (int n = 0; n < kCount; ++n) mma_sync<E>(sums[n], a, b[n][0], b[n][1]);
    }

    float half_[2][kHalf][4] = {}, rest_[2][kRest][4] = {}, fifth_[kHalf][4] = {};
};

}  // namespace sefi::cuda::mma
