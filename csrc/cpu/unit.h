// Steps that all units of work share: scratch memory, visible keys, rows, probabilities.
#pragma once

#include "cpu/simd.h"

namespace sefi {
namespace SEFI_ISA {

constexpr int64_t kMaxTileRows = kTileVectors * kLanes;

SEFI_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out aligned pieces of one block; without a block it only counts the bytes.
class Arena {
public:
    explicit Arena(char* block) : block_(block) {}

    float* floats(int64_t count) {
        float* piece = reinterpret_cast<float*>(block_ + used_);
        used_ += size_t(round_up(4 * count, 64));
        return block_ ? piece : nullptr;
    }
    uint16_t* halves(int64_t count) { return reinterpret_cast<uint16_t*>(floats((count + 1) / 2)); }
    size_t used() const { return used_; }

private:
    char* block_;
    size_t used_ = 0;
};

// The visible keys of a sample. Masked keys are never packed, so no kernel reads them.
struct KeyList {
    int64_t count = 0;
    int16_t index[kMaxKeys];
    int16_t position[kMaxKeys];  // of each key in the list, -1 for a masked key

    KeyList(const Problem& p, int64_t b) {
        const uint8_t* mask = p.key_mask ? p.key_mask + b * p.key_mask_batch : nullptr;
        for (int64_t m = 0; m < p.keys; ++m) {
            const bool visible = !mask || mask[m];
            position[m] = visible ? int16_t(count) : int16_t(-1);
            if (visible) index[count++] = int16_t(m);
        }
    }

    // List index of the key of column t of the probabilities, or -1 for a column of zeros.
    int64_t find_column(const Problem& p, int64_t b, int64_t t) const {
        const int64_t key = p.probs_positions[b * p.probs_positions_batch + t];
        return key >= 0 && key < p.keys ? position[key] : -1;
    }
};

// Offset of column t of a head in the probabilities and in their gradient.
inline int64_t probs_offset(const Problem& p, int64_t b, int64_t h, int64_t t) {
    const int64_t head = p.probs_all_heads ? b * p.heads + h : b;
    return (head * p.probs_count + t) * p.queries;
}

// Weights of the visible keys in the subject loss, times a factor.
inline void load_token_weights(const Problem& p, int64_t b, const KeyList& keys, float factor,
                               float* to) {
    const float* weights = p.token_weights;
    for (int64_t m = 0; m < keys.count; ++m) {
        to[m] = factor * (weights ? weights[b * p.token_weights_batch + keys.index[m]] : 1.0f);
    }
}

// Factors of A_t - A_r in the gradient of the subject loss: 2 g w, mean over heads.
inline void load_loss_factors(const BackwardCall& p, int64_t b, const KeyList& keys, float* to) {
    load_token_weights(p, b, keys, 2.0f * p.grad_subject_loss[b] / float(p.heads), to);
}

// Zeros for the query rows [begin, end) of one head.
inline void zero_rows(const View& view, const Problem& p, int64_t b, int64_t h, int64_t begin,
                      int64_t end) {
    for (int64_t n = begin; view.data && n < end; ++n) {
        __builtin_memset(view.at(p.dtype, b, h, n), 0, size_t(p.head_dim * item_size(p.dtype)));
    }
}

// The results of rows without a visible key.
inline void zero_outputs(const ForwardCall& p, int64_t b, int64_t h, int64_t begin, int64_t end) {
    zero_rows(p.output, p, b, h, begin, end);
    for (int64_t t = 0; t < p.probs_count; ++t) {
        float* row = p.attn_probs + probs_offset(p, b, h, t);
        __builtin_memset(row + begin, 0, size_t(4 * (end - begin)));
    }
}

// Store factor * sums of the visible keys, zeros for the masked ones.
inline void store_key_gradient(const float* sums, int64_t stride, const Problem& p,
                               const KeyList& keys, float factor, const KeyGradient& to) {
    for (int64_t m = 0; sums && m < p.keys; ++m) {
        char* row = to.data + item_size(to.dtype) * m * to.row;
        if (keys.position[m] < 0) {
            __builtin_memset(row, 0, size_t(p.head_dim * item_size(to.dtype)));
        } else {
            store_row(sums + keys.position[m] * stride, p.head_dim, factor, row, to.dtype);
        }
    }
}

// Pack the visible rows as float32 [count, head_dim], followed by a readable vector.
inline void pack_keys(const View& view, DType dtype, int64_t b, int64_t h, const KeyList& keys,
                      int64_t head_dim, float* packed) {
    for (int64_t i = 0; i < keys.count; ++i) {
        load_row(view.at(dtype, b, h, keys.index[i]), dtype, head_dim, packed + i * head_dim);
    }
}

// Float32 rows, packed in scratch memory or in the tensor itself.
struct Rows {
    const float* data;
    int64_t stride;
};

// The visible rows for a product that reads along them: in place if all are visible and float32.
inline Rows key_rows(const View& view, DType dtype, int64_t b, int64_t h, const KeyList& keys,
                     const Problem& p, float* packed) {
    if (dtype == DType::float32 && keys.count == p.keys) {
        return {reinterpret_cast<const float*>(view.at(dtype, b, h, 0)), view.row};
    }
    pack_keys(view, dtype, b, h, keys, p.head_dim, packed);
    return {packed, p.head_dim};
}

inline int64_t packed_floats(const Problem& p) { return p.keys * p.head_dim + kLanes; }

// Load count query rows as float32 [tile_rows, width]; zeros past head_dim and count.
inline void load_rows(const View& view, DType dtype, int64_t b, int64_t h, int64_t n, int64_t count,
                      int64_t tile_rows, int64_t head_dim, int64_t width, float* rows) {
    for (int64_t i = 0; i < count; ++i) {
        load_row(view.at(dtype, b, h, n + i), dtype, head_dim, rows + i * width);
    }
    __builtin_memset(rows + count * width, 0, size_t(4 * (tile_rows - count) * width));
}

}  // namespace SEFI_ISA
}  // namespace sefi
