// Scratch memory of one unit of work, and the keys it attends to.
#pragma once

#include "cpu/convert.h"

namespace sefi {
namespace SEFI_ISA {

constexpr int64_t kMaxTileRows = kTileVectors * kLanes;

SEFI_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Hands out aligned pieces of one block; from a null block it only counts the bytes.
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

// The keys that a sample's mask leaves. Masked keys are never packed, so no kernel sees them.
struct KeyList {
    int64_t count = 0;
    int16_t index[kMaxKeys];
    int16_t position[kMaxKeys];  // of each key in the list, or -1

    KeyList(const Problem& p, int64_t b) {
        const uint8_t* mask = p.key_mask ? p.key_mask + b * p.key_mask_batch : nullptr;
        for (int64_t m = 0; m < p.keys; ++m) {
            const bool attended = !mask || mask[m];
            position[m] = attended ? int16_t(count) : int16_t(-1);
            if (attended) index[count++] = int16_t(m);
        }
    }

    // Place in the list of the key that probs_positions names, or -1 for a column of zeros.
    int64_t find(int64_t key, int64_t keys) const {
        return key >= 0 && key < keys ? position[key] : -1;
    }
};

// The listed rows in float32, close together: [count, head_dim] and a vector more to read past.
inline void pack_keys(const View& view, DType dtype, int64_t b, int64_t h, const KeyList& keys,
                      int64_t head_dim, float* packed) {
    for (int64_t i = 0; i < keys.count; ++i) {
        load_row(view.at(dtype, b, h, keys.index[i]), dtype, head_dim, packed + i * head_dim);
    }
}

// Float32 rows somewhere: packed in scratch, or where the caller has them.
struct Rows {
    const float* data;
    int64_t stride;
};

// The listed rows for a product that reads each of them along: in place if all are there in float32.
inline Rows key_rows(const View& view, DType dtype, int64_t b, int64_t h, const KeyList& keys,
                     const Problem& p, float* packed) {
    if (dtype == DType::float32 && keys.count == p.keys) {
        return {reinterpret_cast<const float*>(view.at(dtype, b, h, 0)), view.row};
    }
    pack_keys(view, dtype, b, h, keys, p.head_dim, packed);
    return {packed, p.head_dim};
}

inline int64_t packed_floats(const Problem& p) { return p.keys * p.head_dim + kLanes; }

// `count` query rows in float32, [tile_rows, width]; what is beyond head_dim or count is zero.
inline void load_rows(const View& view, DType dtype, int64_t b, int64_t h, int64_t n, int64_t count,
                      int64_t tile_rows, int64_t head_dim, int64_t width, float* rows) {
    for (int64_t i = 0; i < count; ++i) {
        load_row(view.at(dtype, b, h, n + i), dtype, head_dim, rows + i * width);
    }
    __builtin_memset(rows + count * width, 0, size_t(4 * (tile_rows - count) * width));
}

}  // namespace SEFI_ISA
}  // namespace sefi
