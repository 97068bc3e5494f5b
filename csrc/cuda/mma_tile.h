// Tiles of the tensor cores: 16 query rows per warp in registers, up to 80 keys in shared memory.
//
// An n8 is a fragment of 8 columns. Lane 4g + t has columns 2t and 2t + 1 of each n8, in rows g and
// g + 8. To load and store 16 bytes of a row at once, both factors of a product use another order
// of columns: in 32 columns lane t has columns 8t to 8t + 7, two of each n8. In a rest of 16
// columns it has columns 4t to 4t + 3.
#pragma once

#include "cuda/kernels.h"

namespace sefi::cuda::mma {

constexpr int kKeyN8 = kKeys / 8, kKeySteps = kKeys / 16;
constexpr uint32_t kAllLanes = ~0u;

// Rows of D two-byte elements in shared memory. A stride of an odd number of 16-byte chunks spreads
// the eight rows of a matrix over all banks.
template <int D>
struct Layout {
    static_assert(D % 8 == 0 && D % 32 != 24, "groups of 32, 16 and 8 columns");
    static constexpr int kN8 = D / 8;
    static constexpr int kStride = 16 * (kN8 | 1);
    static constexpr int kTile = kKeys * kStride;
};

// Row stride in bytes of the probabilities of all keys, by the same rule.
constexpr int kProbsStride = 16 * (kKeyN8 | 1);

// Number of n8 in the group of columns that starts at n8 kFirst.
template <int D, int kFirst>
constexpr int kGroup = D / 8 - kFirst >= 4   ? 4
                       : D / 8 - kFirst >= 2 ? 2
                                             : 1;

SEFI_DEVICE int lane() { return int(threadIdx.x) % 32; }

// Offset of the matrix row of a lane in a tile: score_offset for scores, where the rows of the tile
// are columns of the product, and sum_offset for sums over the rows of the tile.
template <int D>
SEFI_DEVICE uint32_t score_offset() {
    return uint32_t((lane() / 16 * 8 + lane() % 8) * Layout<D>::kStride + lane() / 8 % 2 * 16);
}
template <int D>
SEFI_DEVICE uint32_t sum_offset() {
    return uint32_t(lane() % 16 * Layout<D>::kStride + lane() / 16 * 16);
}

// Load the fragments rows[n8][r] of one row at `from`.
template <int D>
SEFI_DEVICE void load_row(const char* from, int r, uint32_t (&rows)[D / 8][2]) {
    const int t = lane() % 4;
#pragma unroll
    for (int n = 0; n + 4 <= D / 8; n += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from + 16 * n + 16 * t);
        rows[n][r] = four.x;
        rows[n + 1][r] = four.y;
        rows[n + 2][r] = four.z;
        rows[n + 3][r] = four.w;
    }
    constexpr int kWhole = D / 32 * 4;
    if constexpr (D % 32 == 16) {
        const uint2 two = *reinterpret_cast<const uint2*>(from + 16 * kWhole + 8 * t);
        rows[kWhole][r] = two.x;
        rows[kWhole + 1][r] = two.y;
    }
    if constexpr (D % 32 == 8) {
        rows[kWhole][r] = *reinterpret_cast<const uint32_t*>(from + 16 * kWhole + 4 * t);
    }
}

// Leaves the rows unchanged, because blockIdx.z is 0. A load fills adjacent registers with one row,
// but a product needs adjacent registers of two rows. ptxas then copies all four before nearly
// every product, unless an operation that it cannot remove stands in between.
template <int kN8>
SEFI_DEVICE void opaque_barrier(uint32_t (&rows)[kN8][2]) {
#pragma unroll
    for (int i = 0; i < 2 * kN8; ++i) rows[i / 2][i % 2] |= blockIdx.z;
}

// Rows of one head of a tensor. 32-bit row indices and strides find a row by one multiplication.
class Rows {
public:
    template <class E>
    static SEFI_DEVICE Rows of(const View& view, int64_t b, int64_t h) {
        return Rows(reinterpret_cast<char*>(head_of<E>(view, b, h)), sizeof(E) * view.row);
    }
    SEFI_DEVICE char* operator[](int row) const { return first_ + uint64_t(uint32_t(row)) * step_; }

private:
    SEFI_DEVICE Rows(char* first, int64_t step) : first_(first), step_(uint32_t(step)) {}

    char* first_;
    uint32_t step_;
};

// Load the fragments of rows first + g and first + g + 8; zeros from row `end` on.
template <int D>
SEFI_DEVICE void load_rows(const Rows& head, int first, int end, uint32_t (&rows)[D / 8][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane() / 4 + 8 * r;
        if (row < end) {
            load_row<D>(head[row], r, rows);
        } else {
#pragma unroll
            for (int n = 0; n < D / 8; ++n) rows[n][r] = 0;
        }
    }
}

// Store kCount n8 of a group, which are adjacent columns of a lane from `column` on, times a factor
// for each of the two rows.
template <class E, int kCount>
SEFI_DEVICE void store_n8(const Rows& head, int column, int first, int end, float2 factors,
                          const float (&sums)[kCount][4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane() / 4 + 8 * r;
        if (row >= end) continue;
        const float factor = r ? factors.y : factors.x;
        uint32_t pairs[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            pairs[i] = pack<E>(factor * sums[i][2 * r], factor * sums[i][2 * r + 1]);
        }
        char* const to = head[row] + 2 * column;
        if constexpr (kCount == 4) {
            *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else if constexpr (kCount == 2) {
            *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
        } else {
            *reinterpret_cast<uint32_t*>(to) = pairs[0];
        }
    }
}

// Distribution of the 16-byte chunks of kRows rows of D columns among kThreads threads. Adjacent
// threads take adjacent chunks: first a power of two of each row, then the rest.
template <int D, int kRows, int kThreads>
class Chunks {
    static constexpr int kN8 = Layout<D>::kN8;
    static constexpr int kLanes = kN8 >= 16 ? 16 : kN8 >= 8 ? 8 : 4;
    static constexpr int kStep = kThreads / kLanes, kFirst = (kRows + kStep - 1) / kStep;
    static constexpr int kLeft = kN8 - kLanes, kRest = kLeft * kRows;

public:
    static constexpr int kEach =
        kFirst + (kRest + kThreads - 1) / kThreads;  // upper bound per thread

    // Call step(i, row, n8) for the i-th chunk of this thread.
    template <class Step>
    static SEFI_DEVICE void each(const Step& step) {
        const int thread = int(threadIdx.x);
#pragma unroll
        for (int i = 0; i < kFirst; ++i) {
            const int row = thread / kLanes + i * kStep;
            if (kRows % kStep == 0 || row < kRows) step(i, row, thread % kLanes);
        }
        if constexpr (kLeft > 0) {
#pragma unroll
            for (int i = kFirst; i < kEach; ++i) {
                const int place = thread + (i - kFirst) * kThreads;
                const bool inside = kRest % kThreads == 0 || place < kRest;
                if (inside) step(i, place / kLeft, kLanes + place % kLeft);
            }
        }
    }
};

// products += rows * tile^T for 16 rows and kN8 n8 of keys. `tile` is an address with score_offset.
template <int D, class E, int kN8>
SEFI_DEVICE void multiply_keys(const uint32_t (&rows)[D / 8][2], uint32_t tile,
                               float (&products)[kN8][4]) {
    constexpr int kStride = Layout<D>::kStride;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const uint32_t a[4] = {rows[2 * step][0], rows[2 * step][1], rows[2 * step + 1][0],
                               rows[2 * step + 1][1]};
#pragma unroll
        for (int n = 0; n + 2 <= kN8; n += 2) {
            uint32_t b[4];
            ldmatrix(b, tile + uint32_t(8 * n * kStride + 32 * step));
            mma_sync<E>(products[n], a, b[0], b[1]);
            mma_sync<E>(products[n + 1], a, b[2], b[3]);
        }
        if constexpr (kN8 % 2) {
            uint32_t b[2];
            ldmatrix(b, tile + uint32_t(8 * (kN8 - 1) * kStride + 32 * step));
            mma_sync<E>(products[kN8 - 1], a, b[0], b[1]);
        }
    }
    if constexpr (D % 16 == 8) {
        static_assert(kN8 % 2 == 0, "keys in pairs of n8");
        const uint32_t a[2] = {rows[D / 8 - 1][0], rows[D / 8 - 1][1]};
        const uint32_t last = tile - score_offset<D>() + uint32_t(lane() % 16 * kStride);
#pragma unroll
        for (int n = 0; n < kN8; n += 2) {
            uint32_t b[2];
            ldmatrix(b, last + uint32_t(8 * n * kStride + 2 * D - 16));
            mma_sync<E>(products[n], a, b[0]);
            mma_sync<E>(products[n + 1], a, b[1]);
        }
    }
}

// Load right factors for sums over 16 rows of a tile, kCount n8 of columns. `rows` is an address
// with sum_offset.
template <int kCount>
SEFI_DEVICE void load_n8(uint32_t rows, uint32_t (&b)[kCount][2]) {
#pragma unroll
    for (int n = 0; n + 2 <= kCount; n += 2) {
        uint32_t two[4];
        ldmatrix_trans(two, rows + uint32_t(16 * n));
        b[n][0] = two[0];
        b[n][1] = two[1];
        b[n + 1][0] = two[2];
        b[n + 1][1] = two[3];
    }
    if constexpr (kCount % 2) ldmatrix_trans(b[kCount - 1], rows + 16 * (kCount - 1));
}

// sums += weights * tile for kCount n8 of columns. `tile` is an address with sum_offset.
template <int D, class E, int kCount>
SEFI_DEVICE void add_weighted_rows(const uint32_t (&weights)[kKeySteps][4], uint32_t tile,
                                   float (&sums)[kCount][4]) {
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
        uint32_t b[kCount][2];
        load_n8(tile + uint32_t(16 * k * Layout<D>::kStride), b);
#pragma unroll
        for (int n = 0; n < kCount; ++n) mma_sync<E>(sums[n], weights[k], b[n][0], b[n][1]);
    }
}

// One summand weights * tile. `tile` is an address with sum_offset.
struct WeightedTile {
    const uint32_t (&weights)[kKeySteps][4];
    uint32_t tile;
    bool present = true;
};

// Store factors * sum of weights * tile for 16 rows of one head, group by group of columns.
template <int D, int kFirst, class E, class... Parts>
SEFI_DEVICE void store_weighted_sum(float2 factors, const Rows& head, int first, int end,
                                    const Parts&... parts) {
    if constexpr (kFirst < D / 8) {
        constexpr int kCount = kGroup<D, kFirst>;
        float sums[kCount][4] = {};
        const auto add = [&](const WeightedTile& part) {
            if (part.present)
                add_weighted_rows<D, E>(part.weights, part.tile + uint32_t(16 * kFirst), sums);
        };
        (add(parts), ...);
        const int column = 8 * kFirst + 2 * kCount * (lane() % 4);
        store_n8<E>(head, column, first, end, factors, sums);
        store_weighted_sum<D, kFirst + kCount, E>(factors, head, first, end, parts...);
    }
}

// Pack probabilities or their gradients as left factors of add_weighted_rows.
template <class E>
SEFI_DEVICE void pack_weights(const float (&values)[kKeyN8][4], uint32_t (&weights)[kKeySteps][4]) {
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float (&pairs)[4] = values[2 * k + i / 2];
            weights[k][i] = pack<E>(pairs[2 * (i % 2)], pairs[2 * (i % 2) + 1]);
        }
    }
}

// Asynchronous copies of kRows rows of one head to shared memory by kThreads threads.
template <int D, class E, int kRows, int kThreads>
class RowCopies {
public:
    SEFI_DEVICE RowCopies(const View& view, int64_t b, int64_t h)
        : head_(Rows::of<E>(view, b, h)) {}

    // Copy the rows from `first` on, or zeros from row `end` on. The caller commits the group.
    SEFI_DEVICE void copy(int first, int end, uint32_t to) const {
        Chunks<D, kRows, kThreads>::each([&](int, int row, int n8) {
            // The address must be valid even if nothing is read.
            const char* const from = head_[min(first + row, end - 1)] + 16 * n8;
            cp_async(to + uint32_t(row * Layout<D>::kStride + 16 * n8), from, first + row < end);
        });
    }

private:
    Rows head_;
};

}  // namespace sefi::cuda::mma
