// Pieces of the simple kernels: any size and layout, float32 arithmetic, tiles in shared memory.
#pragma once

#include "cuda/arguments.h"

namespace sefi::cuda::simple {

constexpr int kThreads = 128, kRows = 16;
// A piece of the keys on its way through shared memory; the padding spreads it over the banks.
constexpr int kPieceKeys = 32, kPieceColumns = 64, kPieceStride = kPieceColumns + 1;
constexpr int kTerms = 8;
constexpr int kPiece = kPieceKeys * kPieceStride;
constexpr int kRowThreads = kThreads / kRows;  // the threads of one warp that share a row

// Odd, so that rows lie on different banks.
SEFI_DEVICE int padded(int64_t n) { return int(n) | 1; }

// One head's rows of a tensor.
template <class E>
struct Rows {
    const E* data;
    int64_t stride;

    SEFI_DEVICE Rows(const View& view, int64_t b, int64_t h)
        : data(head_of<E>(view, b, h)), stride(view.row) {}
    SEFI_DEVICE float at(int64_t row, int column) const {
        return widen(data[row * stride + column]);
    }
};

// kCount rows from `first` on, zeros from row `end` on.
template <int kCount, class E>
SEFI_DEVICE void stage(const Rows<E>& rows, int64_t first, int64_t end, int width, float* to) {
    for (int i = threadIdx.x; i < kCount * width; i += kThreads) {
        const int row = i / width, column = i % width;
        to[row * padded(width) + column] =
            first + row < end ? rows.at(first + row, column) : 0.0f;
    }
}

// Whether a sample may attend to a key.
struct Visible {
    const uint8_t* mask;

    SEFI_DEVICE Visible(const Problem& p, int64_t b)
        : mask(p.key_mask ? p.key_mask + b * p.key_mask_batch : nullptr) {}
    SEFI_DEVICE bool operator()(int key) const { return !mask || mask[key]; }
};

// One piece of the keys, zeros for those that are hidden or do not exist.
template <class E>
SEFI_DEVICE void stage_piece(const Rows<E>& rows, int key, int keys, int column, int width,
                             const Visible& visible, float* piece) {
    __syncthreads();
    for (int i = threadIdx.x; i < kPieceKeys * kPieceColumns; i += kThreads) {
        const int k = i / kPieceColumns, c = i % kPieceColumns;
        const bool inside = key + k < keys && column + c < width && visible(key + k);
        piece[k * kPieceStride + c] = inside ? rows.at(key + k, column + c) : 0.0f;
    }
    __syncthreads();
}

// products[row][key] = x[row] . keys[key] for the tile's rows and all keys.
template <class E>
SEFI_DEVICE void inner_products(const float* x, const Rows<E>& rows, int keys, int width,
                                const Visible& visible, float* piece, float* products) {
    // Each thread has 2 rows and 2 keys of a piece.
    const int row = 2 * (threadIdx.x / 16), key = threadIdx.x % 16;
    for (int first = 0; first < keys; first += kPieceKeys) {
        float sums[2][2] = {};
        for (int column = 0; column < width; column += kPieceColumns) {
            stage_piece(rows, first, keys, column, width, visible, piece);
            const float* left = x + row * padded(width) + column;
            const float* right = piece + key * kPieceStride;
            const int count = min(kPieceColumns, width - column);
            for (int c = 0; c < count; ++c) {
                const float x0 = left[c], x1 = left[padded(width) + c];
                const float y0 = right[c], y1 = right[16 * kPieceStride + c];
                sums[0][0] = fmaf(x0, y0, sums[0][0]);
                sums[0][1] = fmaf(x0, y1, sums[0][1]);
                sums[1][0] = fmaf(x1, y0, sums[1][0]);
                sums[1][1] = fmaf(x1, y1, sums[1][1]);
            }
        }
        for (int i = 0; i < 4; ++i) {
            const int k = first + key + 16 * (i % 2);
            if (k < keys) products[(row + i / 2) * padded(keys) + k] = sums[i / 2][i % 2];
        }
    }
    __syncthreads();
}

// store(row, column, sum over the keys of weights[row][key] * keys[key][column]) for the tile;
// `other`, if there, is a second pair of weights and keys that is added.
template <class E, class Store>
SEFI_DEVICE void weighted_sums(const float* weights, const Rows<E>& rows,
                               const float* other_weights, const Rows<E>& other, int keys,
                               int width, const Visible& visible, float* piece,
                               const Store& store) {
    // Each thread has 2 rows and 4 columns of a piece.
    const int row = 2 * (threadIdx.x / 16), mine = threadIdx.x % 16;
    for (int column = 0; column < width; column += kPieceColumns) {
        float sums[2][4] = {};
        for (int turn = 0; turn < (other_weights ? 2 : 1); ++turn) {
            for (int first = 0; first < keys; first += kPieceKeys) {
                stage_piece(turn ? other : rows, first, keys, column, width, visible, piece);
                const float* left =
                    (turn ? other_weights : weights) + row * padded(keys) + first;
                const int count = min(kPieceKeys, keys - first);
                // Few terms a sum: one after the other, many would err more than the eager path's.
                for (int start = 0; start < count; start += kTerms) {
                    float part[2][4] = {};
                    for (int k = start; k < min(start + kTerms, count); ++k) {
                        const float w0 = left[k], w1 = left[padded(keys) + k];
                        for (int i = 0; i < 4; ++i) {
                            const float y = piece[k * kPieceStride + mine + 16 * i];
                            part[0][i] = fmaf(w0, y, part[0][i]);
                            part[1][i] = fmaf(w1, y, part[1][i]);
                        }
                    }
                    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += part[i / 4][i % 4];
                }
            }
        }
        for (int i = 0; i < 8; ++i) {
            const int c = column + mine + 16 * (i % 4);
            if (c < width) store(row + i / 4, c, sums[i / 4][i % 4]);
        }
    }
}

template <class Combine>
SEFI_DEVICE float over_row(float x, const Combine& combine) {
    for (int distance = 1; distance < kRowThreads; distance *= 2) {
        x = combine(x, __shfl_xor_sync(~0u, x, distance));
    }
    return x;
}
SEFI_DEVICE float row_sum(float x) {
    return over_row(x, [](float a, float b) { return a + b; });
}

struct Peak {
    float peak, inverse;
};

// Scores to probabilities in place; a thread sees to the keys `mine`, `mine` + kRowThreads, ... of
// its row and reads no other. A row without any key gets zeros and inverse 0.
SEFI_DEVICE Peak softmax(float* scores, int keys, int mine, const Visible& visible,
                         const Cut& cut) {
    float peak = -INFINITY;
    for (int k = mine; k < keys; k += kRowThreads) {
        if (visible(k)) peak = fmaxf(peak, cut.sign * scores[k]);
    }
    peak = over_row(peak, [](float a, float b) { return fmaxf(a, b); });
    float total = 0.0f;
    for (int k = mine; k < keys; k += kRowThreads) {
        scores[k] =
            visible(k) ? exp2f((cut.sign * scores[k] - peak) * cut.scale_log2) : 0.0f;
        total += scores[k];
    }
    total = row_sum(total);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int k = mine; k < keys; k += kRowThreads) scores[k] = multiply(scores[k], inverse);
    return {peak, inverse};
}

}  // namespace sefi::cuda::simple
