// Steps of the kernels without tensor cores: float32 arithmetic on tiles in shared memory.
#pragma once

#include "cuda/params.h"

namespace sefi::cuda::simt {

constexpr int kThreads = 128, kRows = 16;
// Keys pass through shared memory in tiles, whose padding spreads them over the banks.
constexpr int kKeyTileKeys = 32, kKeyTileColumns = 64, kKeyTileStride = kKeyTileColumns + 1;
constexpr int kKeyTile = kKeyTileKeys * kKeyTileStride;
constexpr int kRowThreads = kThreads / kRows;  // threads of one warp that share a row

// An odd row stride spreads the rows over the banks.
SEFI_DEVICE int padded(int64_t n) { return int(n) | 1; }

// Rows of one head of a tensor.
template <class E>
struct Rows {
    const E* data;
    int64_t stride;

    SEFI_DEVICE Rows(const View& view, int64_t b, int64_t h)
        : data(head_of<E>(view, b, h)), stride(view.row) {}
    SEFI_DEVICE float at(int64_t row, int column) const {
        return to_float(data[row * stride + column]);
    }
};

// Load kCount rows from `first` on; zeros from row `end` on.
template <int kCount, class E>
SEFI_DEVICE void load_tile(const Rows<E>& rows, int64_t first, int64_t end, int head_dim,
                           float* to) {
    for (int i = threadIdx.x; i < kCount * head_dim; i += kThreads) {
        const int row = i / head_dim, column = i % head_dim;
        to[row * padded(head_dim) + column] =
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

// Load a tile of keys; zeros for keys that are hidden or do not exist.
template <class E>
SEFI_DEVICE void load_key_tile(const Rows<E>& rows, int key, int keys, int column, int head_dim,
                               const Visible& visible, float* key_tile) {
    __syncthreads();
    for (int i = threadIdx.x; i < kKeyTileKeys * kKeyTileColumns; i += kThreads) {
        const int k = i / kKeyTileColumns, c = i % kKeyTileColumns;
        const bool inside = key + k < keys && column + c < head_dim && visible(key + k);
        key_tile[k * kKeyTileStride + c] = inside ? rows.at(key + k, column + c) : 0.0f;
    }
    __syncthreads();
}

// products[row][key] = x[row] . keys[key] for the rows of a tile and all keys.
template <class E>
SEFI_DEVICE void multiply_keys(const float* x, const Rows<E>& rows, int keys, int head_dim,
                               const Visible& visible, float* key_tile, float* products) {
    // A thread has 2 rows and 2 keys of a key tile.
    const int row = 2 * (threadIdx.x / 16), key = threadIdx.x % 16;
    for (int first = 0; first < keys; first += kKeyTileKeys) {
        float sums[2][2] = {};
        for (int column = 0; column < head_dim; column += kKeyTileColumns) {
            load_key_tile(rows, first, keys, column, head_dim, visible, key_tile);
            const float* left = x + row * padded(head_dim) + column;
            const float* right = key_tile + key * kKeyTileStride;
            const int count = min(kKeyTileColumns, head_dim - column);
            for (int c = 0; c < count; ++c) {
                const float x0 = left[c], x1 = left[padded(head_dim) + c];
                const float y0 = right[c], y1 = right[16 * kKeyTileStride + c];
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

// Call store(row, column, sum) with sum = sum over the keys of weights[row][key] *
// keys[key][column], plus the same for ref_weights and ref_keys unless ref_weights is null.
template <class E, class Store>
SEFI_DEVICE void weighted_sums(const float* weights, const Rows<E>& rows, const float* ref_weights,
                               const Rows<E>& ref_keys, int keys, int head_dim,
                               const Visible& visible, float* key_tile, const Store& store) {
    // A thread has 2 rows and 4 columns of a key tile.
    constexpr int kTerms = 8;
    const int row = 2 * (threadIdx.x / 16), lane = threadIdx.x % 16;
    for (int column = 0; column < head_dim; column += kKeyTileColumns) {
        float sums[2][4] = {};
        for (int pass = 0; pass < (ref_weights ? 2 : 1); ++pass) {
            for (int first = 0; first < keys; first += kKeyTileKeys) {
                load_key_tile(pass ? ref_keys : rows, first, keys, column, head_dim, visible,
                              key_tile);
                const float* left = (pass ? ref_weights : weights) + row * padded(keys) + first;
                const int count = min(kKeyTileKeys, keys - first);
                // Short partial sums keep the rounding error below that of the eager path.
                for (int start = 0; start < count; start += kTerms) {
                    float part[2][4] = {};
                    for (int k = start; k < min(start + kTerms, count); ++k) {
                        const float w0 = left[k], w1 = left[padded(keys) + k];
                        for (int i = 0; i < 4; ++i) {
                            const float y = key_tile[k * kKeyTileStride + lane + 16 * i];
                            part[0][i] = fmaf(w0, y, part[0][i]);
                            part[1][i] = fmaf(w1, y, part[1][i]);
                        }
                    }
                    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += part[i / 4][i % 4];
                }
            }
        }
        for (int i = 0; i < 8; ++i) {
            const int c = column + lane + 16 * (i % 4);
            if (c < head_dim) store(row + i / 4, c, sums[i / 4][i % 4]);
        }
    }
}

template <class Combine>
SEFI_DEVICE float reduce_row(float x, const Combine& combine) {
    for (int distance = 1; distance < kRowThreads; distance *= 2) {
        x = combine(x, __shfl_xor_sync(~0u, x, distance));
    }
    return x;
}
SEFI_DEVICE float row_sum(float x) {
    return reduce_row(x, [](float a, float b) { return a + b; });
}

struct RowStats {
    float row_max, inv_sum;
};

// Turn the scores of a row into probabilities in place. A thread reads and writes only the keys
// lane, lane + kRowThreads, ... of its row. A row without a visible key gets zeros and inv_sum 0.
template <class Params>
SEFI_DEVICE RowStats softmax(float* scores, int keys, int lane, const Visible& visible,
                             const Params& a) {
    float row_max = -INFINITY;
    for (int k = lane; k < keys; k += kRowThreads) {
        if (visible(k)) row_max = fmaxf(row_max, a.scale_sign * scores[k]);
    }
    row_max = reduce_row(row_max, [](float a, float b) { return fmaxf(a, b); });
    float sum = 0.0f;
    for (int k = lane; k < keys; k += kRowThreads) {
        scores[k] =
            visible(k) ? exp2f((a.scale_sign * scores[k] - row_max) * a.sm_scale_log2) : 0.0f;
        sum += scores[k];
    }
    sum = row_sum(sum);
    const float inv_sum = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int k = lane; k < keys; k += kRowThreads) scores[k] = mul_rn(scores[k], inv_sum);
    return {row_max, inv_sum};
}

}  // namespace sefi::cuda::simt
