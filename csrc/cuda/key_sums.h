// Sums over query rows: of 80 keys by all columns of a head, as the warps of a block share them.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

SEFI_DEVICE void store_pair(float first, float second, float* to) {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
}
template <class E>
SEFI_DEVICE void store_pair(float first, float second, E* to) {
    *reinterpret_cast<uint32_t*>(to) = pack<E>(first, second);
}

// The sums of a warp's keys and columns, times a factor. `row`: elements from key to key.
template <class T, int kEights>
SEFI_DEVICE void store_sums(const float (&sums)[kEights][4], float factor, int64_t keys, int tile,
                            T* to, int64_t row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int key = 16 * tile + lane() / 4 + 8 * r;
        if (key >= keys) continue;
        T* const head = to + key * row + 2 * (lane() % 4);
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
            store_pair(factor * sums[e][2 * r], factor * sums[e][2 * r + 1], head + 8 * e);
        }
    }
}

// Has `store(to, row)` write a block's sums: among the partial sums, or where there are none into
// the gradient itself, if that is wanted.
template <int D, class E, class Store>
SEFI_DEVICE void store_gradient(const BackwardArguments& a, float* partials, const View& gradient,
                                const Store& store) {
    if (partials) {
        const int64_t entry = blockIdx.x * a.cut.splits + blockIdx.y;
        store(partials + entry * a.call.keys * D, int64_t(D));
    } else if (gradient.data) {
        const unsigned heads = unsigned(a.call.heads);
        store(head_of<E>(gradient, blockIdx.x / heads, blockIdx.x % heads), gradient.row);
    }
}

// A warp sums two of the first four tiles of 16 keys by one group of columns, and the fifth tile by
// half of these: so each matrix it reads is a factor of two or three products. The last groups and
// halves overlap where the columns are no multiple of them.
template <int D, int kWarps>
class KeySums {
    static constexpr int kGroups = kWarps / 2;
    static constexpr int kEights = (Layout<D>::kEights + kGroups - 1) / kGroups;
    static constexpr int kHalf = (kEights + 1) / 2, kRest = kEights - kHalf;

public:
    // Adds map^T * tile: kRows rows of a map at `map` and of a tile at `rows`, in shared memory.
    template <class E, int kRows>
    SEFI_DEVICE void add(uint32_t map, uint32_t rows) {
        map += uint32_t((lane() / 16 * 8 + lane() % 8) * kMapStride + lane() / 8 % 2 * 16);
        rows += sum_offset<D>();
#pragma unroll
        for (int chunk = 0; chunk < kRows / 16; ++chunk) {
            uint32_t half[kHalf][2], rest[kRest][2], a[4];
            const uint32_t chunk_rows = rows + uint32_t(16 * chunk * Layout<D>::kStride);
            load_eights(chunk_rows + uint32_t(16 * half_eight()), half);
            load_eights(chunk_rows + uint32_t(16 * rest_eight()), rest);
            const uint32_t keys = map + uint32_t(16 * chunk * kMapStride);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_transposed(a, keys + uint32_t(32 * (2 * side() + i)));
                multiply<E>(a, half, half_[i]);
                multiply<E>(a, rest, rest_[i]);
            }
            load_transposed(a, keys + 32 * 4);
            multiply<E>(a, half, fifth_);
        }
    }

    // factor * sums as [keys, D].
    template <class T>
    SEFI_DEVICE void store(float factor, int64_t keys, T* to, int64_t row) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            store_sums(half_[i], factor, keys, 2 * side() + i, to + 8 * half_eight(), row);
            store_sums(rest_[i], factor, keys, 2 * side() + i, to + 8 * rest_eight(), row);
        }
        store_sums(fifth_, factor, keys, 4, to + 8 * half_eight(), row);
    }

private:
    static SEFI_DEVICE int side() { return int(threadIdx.x) / 32 % 2; }
    static SEFI_DEVICE int first_eight() {
        return min(int(threadIdx.x) / 64 * kEights, Layout<D>::kEights - kEights);
    }
    // Of the fifth tile's columns, and of the others: one warp has the first half, its neighbour
    // the last.
    static SEFI_DEVICE int half_eight() { return first_eight() + (side() ? kRest : 0); }
    static SEFI_DEVICE int rest_eight() { return first_eight() + (side() ? 0 : kHalf); }

    template <class E, int kCount>
    static SEFI_DEVICE void multiply(const uint32_t (&a)[4], const uint32_t (&b)[kCount][2],
                                     float (&sums)[kCount][4]) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) multiply_add<E>(sums[e], a, b[e][0], b[e][1]);
    }

    float half_[2][kHalf][4] = {}, rest_[2][kRest][4] = {}, fifth_[kHalf][4] = {};
};

}  // namespace sefi::cuda::tensor
