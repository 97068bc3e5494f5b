// Tiles of the matrix units: 16 rows a warp in registers, up to 80 keys in shared memory.
//
// A lane has columns 2t, 2t + 1 of every eight columns (t = lane % 4) of rows g and g + 8
// (g = lane / 4). So that it can still read and write 16 bytes of a row at once, the columns of a
// head are taken in another order, the same for both factors of a product: of each 32 columns lane
// t has columns 8t to 8t + 7, two in each eight; of a rest of 16 columns 4t to 4t + 3.
#pragma once

#include "cuda/arguments.h"

namespace sefi::cuda::tensor {

constexpr int kKeys = 80, kKeyEights = kKeys / 8, kKeySteps = kKeys / 16;
constexpr uint32_t kAllLanes = ~0u;

// Rows of D two-byte elements in shared memory. An odd number of 16-byte chunks from row to row
// spreads the eight rows of a matrix over all banks.
template <int D>
struct Layout {
    static_assert(D % 8 == 0 && D % 32 != 24, "head widths in groups of 32, 16 and 8 columns");
    static constexpr int kEights = D / 8;
    static constexpr int kStride = 16 * (kEights | 1);
    static constexpr int kTile = kKeys * kStride;
};

// Bytes from row to row of a map of all keys, by the same rule.
constexpr int kMapStride = 16 * (kKeyEights | 1);

// Eights in the group of columns that begins at eight kFirst.
template <int D, int kFirst>
constexpr int kGroup = D / 8 - kFirst >= 4 ? 4 : D / 8 - kFirst >= 2 ? 2 : 1;

SEFI_DEVICE int lane() { return int(threadIdx.x) % 32; }

// Where a lane's row of the matrices lies in a tile: for scores, whose tile's rows are columns of
// the product, and for sums over the tile's rows.
template <int D>
SEFI_DEVICE uint32_t score_offset() {
    return uint32_t((lane() / 16 * 8 + lane() % 8) * Layout<D>::kStride + lane() / 8 % 2 * 16);
}
template <int D>
SEFI_DEVICE uint32_t sum_offset() {
    return uint32_t(lane() % 16 * Layout<D>::kStride + lane() / 16 * 16);
}

// A lane's fragments of one row at `from`: rows[eight][r].
template <int D>
SEFI_DEVICE void load_row(const char* from, int r, uint32_t (&rows)[D / 8][2]) {
    const int t = lane() % 4;
#pragma unroll
    for (int e = 0; e + 4 <= D / 8; e += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(from + 16 * e + 16 * t);
        rows[e][r] = four.x;
        rows[e + 1][r] = four.y;
        rows[e + 2][r] = four.z;
        rows[e + 3][r] = four.w;
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

// Before rows that were loaded become factors. One load fills neighbouring registers with one row,
// and a product wants those of two rows side by side: the assembler then copies all four for nearly
// each product, but not behind an operation that it cannot see through. No grid here has a second
// layer.
template <int kEights>
SEFI_DEVICE void settle(uint32_t (&rows)[kEights][2]) {
#pragma unroll
    for (int i = 0; i < 2 * kEights; ++i) rows[i / 2][i % 2] |= blockIdx.z;
}

// The rows of one head of a tensor whose rows and bytes from row to row 32 bits count: one
// multiplication finds a row.
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

// Fragments of rows first + g and first + g + 8; zeros from row `end` on.
template <int D>
SEFI_DEVICE void load_rows(const Rows& head, int first, int end, uint32_t (&rows)[D / 8][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first + lane() / 4 + 8 * r;
        if (row < end) {
            load_row<D>(head[row], r, rows);
        } else {
#pragma unroll
            for (int e = 0; e < D / 8; ++e) rows[e][r] = 0;
        }
    }
}

// The same way back: kCount eights of a group, whose columns lie side by side in a lane from
// `column` on, times a factor for each of the two rows.
template <class E, int kCount>
SEFI_DEVICE void store_eights(const Rows& head, int column, int first, int end, float2 factors,
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

// The 16-byte chunks of kRows rows of D columns, shared by kThreads threads: neighbours take
// neighbouring chunks of a row, as many as a power of two allows, and then what is left.
template <int D, int kRows, int kThreads>
class Chunks {
    static constexpr int kEights = Layout<D>::kEights;
    static constexpr int kLanes = kEights >= 16 ? 16 : kEights >= 8 ? 8 : 4;
    static constexpr int kStep = kThreads / kLanes, kFirst = (kRows + kStep - 1) / kStep;
    static constexpr int kLeft = kEights - kLanes, kRest = kLeft * kRows;

public:
    static constexpr int kEach = kFirst + (kRest + kThreads - 1) / kThreads;  // at most, a thread

    // step(i, row, eight) for the i-th chunk of this thread.
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

// products += rows * tile^T: 16 rows by eights of keys. `tile` is the tile's address with
// score_offset.
template <int D, class E, int kEights>
SEFI_DEVICE void multiply_keys(const uint32_t (&rows)[D / 8][2], uint32_t tile,
                               float (&products)[kEights][4]) {
    constexpr int kStride = Layout<D>::kStride;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const uint32_t a[4] = {rows[2 * step][0], rows[2 * step][1], rows[2 * step + 1][0],
                               rows[2 * step + 1][1]};
#pragma unroll
        for (int e = 0; e + 2 <= kEights; e += 2) {
            uint32_t b[4];
            load_matrices(b, tile + uint32_t(8 * e * kStride + 32 * step));
            multiply_add<E>(products[e], a, b[0], b[1]);
            multiply_add<E>(products[e + 1], a, b[2], b[3]);
        }
        if constexpr (kEights % 2) {
            uint32_t b[2];
            load_matrices(b, tile + uint32_t(8 * (kEights - 1) * kStride + 32 * step));
            multiply_add<E>(products[kEights - 1], a, b[0], b[1]);
        }
    }
    if constexpr (D % 16 == 8) {
        static_assert(kEights % 2 == 0, "two eights of keys at a time");
        const uint32_t a[2] = {rows[D / 8 - 1][0], rows[D / 8 - 1][1]};
        const uint32_t last = tile - score_offset<D>() + uint32_t(lane() % 16 * kStride);
#pragma unroll
        for (int e = 0; e < kEights; e += 2) {
            uint32_t b[2];
            load_matrices(b, last + uint32_t(8 * e * kStride + 2 * D - 16));
            multiply_add<E>(products[e], a, b[0]);
            multiply_add<E>(products[e + 1], a, b[1]);
        }
    }
}

// Right factors of sums over a tile's rows, for kCount eights of columns. `rows`: the address of
// the first of 16 rows and of the columns, with sum_offset.
template <int kCount>
SEFI_DEVICE void load_eights(uint32_t rows, uint32_t (&b)[kCount][2]) {
#pragma unroll
    for (int e = 0; e + 2 <= kCount; e += 2) {
        uint32_t two[4];
        load_transposed(two, rows + uint32_t(16 * e));
        b[e][0] = two[0];
        b[e][1] = two[1];
        b[e + 1][0] = two[2];
        b[e + 1][1] = two[3];
    }
    if constexpr (kCount % 2) load_transposed(b[kCount - 1], rows + 16 * (kCount - 1));
}

// sums += weights * tile for kCount eights of columns. `tile`: the address of the first of them,
// with sum_offset.
template <int D, class E, int kCount>
SEFI_DEVICE void weigh_keys(const uint32_t (&weights)[kKeySteps][4], uint32_t tile,
                            float (&sums)[kCount][4]) {
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
        uint32_t b[kCount][2];
        load_eights(tile + uint32_t(16 * k * Layout<D>::kStride), b);
#pragma unroll
        for (int e = 0; e < kCount; ++e) multiply_add<E>(sums[e], weights[k], b[e][0], b[e][1]);
    }
}

// Weights and the tile they weigh, at its address with sum_offset; nothing where not `taken`.
struct Weighed {
    const uint32_t (&weights)[kKeySteps][4];
    uint32_t tile;
    bool taken = true;
};

// The sum of weights * tile times factors: 16 rows of one head, group by group of columns.
template <int D, int kFirst, class E, class... Parts>
SEFI_DEVICE void write_sums(float2 factors, const Rows& head, int first, int end,
                            const Parts&... parts) {
    if constexpr (kFirst < D / 8) {
        constexpr int kCount = kGroup<D, kFirst>;
        float sums[kCount][4] = {};
        const auto add = [&](const Weighed& part) {
            if (part.taken) weigh_keys<D, E>(part.weights, part.tile + uint32_t(16 * kFirst), sums);
        };
        (add(parts), ...);
        const int column = 8 * kFirst + 2 * kCount * (lane() % 4);
        store_eights<E>(head, column, first, end, factors, sums);
        write_sums<D, kFirst + kCount, E>(factors, head, first, end, parts...);
    }
}

// Maps or their gradients as the left factor of weigh_keys.
template <class E>
SEFI_DEVICE void pack_weights(const float (&map)[kKeyEights][4],
                              uint32_t (&weights)[kKeySteps][4]) {
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&pairs)[4] = map[2 * k + i / 2];
            weights[k][i] = pack<E>(pairs[2 * (i % 2)], pairs[2 * (i % 2) + 1]);
        }
    }
}

}  // namespace sefi::cuda::tensor
