// Forward of one head for a range of query rows by products of bfloat16 parts.
#pragma once

#include "cpu/dot_pack.h"
#include "cpu/dot_softmax.h"

namespace sefi {
namespace SEFI_ISA {

constexpr int64_t kPairRows = 2 * kTileSide;

// Sizes in tiles, and the operands that they give.
struct DotShape {
    int64_t keys, key_terms, width, width_terms;

    DotShape(const Problem& p, int64_t keys)
        : keys(tiles(keys, kTileSide)),
          key_terms(tiles(keys, kTileDepth)),
          width(tiles(p.head_dim, kTileSide)),
          width_terms(tiles(p.head_dim, kTileDepth)) {}

    int64_t key_stride() const { return keys * kTileSide; }
    int64_t row_stride() const { return width * kTileSide; }

    // Columns are keys, terms the head's width.
    RightTiles by_width(Arena& arena, int parts) const {
        uint16_t* data = arena.halves(parts * keys * width_terms * kTileElements);
        return {data, keys * width_terms, width_terms, 1};
    }
    LeftTiles left(Arena& arena, int parts, int64_t pairs, int64_t depth) const {
        return {arena.halves(LeftTiles::elements(parts, pairs, depth)), pairs, depth};
    }
    // All keys as rows; interleaved, their terms are the keys.
    LeftTiles key_rows(Arena& arena, int parts) const {
        return left(arena, parts, key_terms, width_terms);
    }
};

template <int kParts>
inline void interleave_all(const LeftTiles& rows) {
    for (int64_t pair = 0; pair < rows.pairs; ++pair) interleave_rows<kParts>(rows, pair);
}

template <int kParts>
class DotForward {
public:
    DotForward(const ForwardCall& call, int64_t b, int64_t h, char* memory)
        : call_(call), b_(b), h_(h), keys_(call, b), shape_(call, keys_.count), lanes_(keys_.count),
          scratch_(call, shape_, memory) {
        if (keys_.count == 0) return;
        const float sign = ScoreScale(call.scale).sign;
        if (call.reference_key.data) {
            pack(call.reference_key, scratch_.value);
            transpose_rows<kParts>(scratch_.value, scratch_.reference, sign);
            __builtin_memset(weights_, 0, sizeof weights_);
            for (int64_t m = 0; m < keys_.count; ++m) {
                const float* weights = call.token_weights;
                weights_[m] = weights ? weights[b * call.token_weights_batch + keys_.index[m]] : 1.0f;
            }
        }
        pack(call.key, scratch_.value);
        transpose_rows<kParts>(scratch_.value, scratch_.key, sign);
        pack(call.value, scratch_.value);
        interleave_all<kParts>(scratch_.value);
    }

    double run(int64_t begin, int64_t end) {
        if (keys_.count == 0) {
            fill_zeros(begin, end);
            return 0.0;
        }
        double subject_loss = 0.0;
        for (int64_t n = begin; n < end; n += kPairRows) {
            subject_loss += rows(n, end);
        }
        return subject_loss;
    }

    static size_t scratch_bytes(const Problem& p) {
        return Scratch(p, DotShape(p, p.keys), nullptr).bytes;
    }

private:
    struct Scratch {
        Scratch(const Problem& p, const DotShape& shape, char* memory) {
            Arena arena(memory);
            key = shape.by_width(arena, kParts);
            if (p.reference_key.data) reference = shape.by_width(arena, kParts);
            value = shape.key_rows(arena, kParts);
            query = shape.left(arena, kParts, 1, shape.width_terms);
            probability = shape.left(arena, kParts, 1, shape.key_terms);
            target = arena.floats(kPairRows * shape.key_stride());
            if (p.reference_key.data) anchor = arena.floats(kPairRows * shape.key_stride());
            output = arena.floats(kPairRows * shape.row_stride());
            bytes = arena.used();
        }
        RightTiles key, reference;
        LeftTiles value;  // interleaved
        LeftTiles query, probability;
        float *target, *anchor = nullptr, *output;  // target, anchor: A_t, A_r before division
        size_t bytes;
    };

    void pack(const View& view, const LeftTiles& to) const {
        pack_key_rows<kParts>(view, call_.dtype, b_, h_, keys_, call_.head_dim, to);
    }

    double rows(int64_t n, int64_t end) {
        const int64_t count = end - n < kPairRows ? end - n : kPairRows;
        const int64_t row_tiles = tiles(count, kTileSide), stride = shape_.key_stride();
        const float factor = ScoreScale(call_.scale).factor;
        pack_query_rows<kParts>(call_.query, call_.dtype, b_, h_, n, count, call_.head_dim,
                                scratch_.query, 0);
        Ahead ahead;
        const int64_t next = end - n - count < kPairRows ? end - n - count : kPairRows;
        ahead.add(call_.output, call_.dtype, b_, h_, n, count, call_.head_dim);
        ahead.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        float inverse[kPairRows], inverse_anchor[kPairRows];
        probabilities(scratch_.key, row_tiles, factor, scratch_.target, inverse, ahead);
        for (int64_t r = 0; r < row_tiles * kTileSide; ++r) {
            const float* row = scratch_.target + r * stride;
            pack_values<kParts>(shape_.keys, scratch_.probability, r,
                                [&](int64_t v) __attribute__((always_inline)) {
                                    return load(row + v * kLanes);
                                });
        }
        multiply<kParts>(scratch_.probability, 0, row_tiles, interleaved(scratch_.value),
                         shape_.width, shape_.key_terms, scratch_.output, shape_.row_stride(), false);
        for (int64_t i = 0; i < count; ++i) {
            if (i % kTileSide == 0) keep_awake();
            store_row(scratch_.output + i * shape_.row_stride(), call_.head_dim, inverse[i],
                      call_.output.at(call_.dtype, b_, h_, n + i), call_.dtype);
        }
        if (call_.probs_count) write_maps(n, count, inverse);
        if (!call_.reference_key.data) return 0.0;
        probabilities(scratch_.reference, row_tiles, factor, scratch_.anchor, inverse_anchor, ahead);
        return align(count, inverse, inverse_anchor);
    }

    void probabilities(const RightTiles& key, int64_t row_tiles, float factor, float* scores,
                       float* inverse, Ahead& ahead) {
        const int64_t stride = shape_.key_stride();
        multiply<kParts>(scratch_.query, 0, row_tiles, key, shape_.keys, shape_.width_terms, scores,
                         stride, false);
        for (int64_t i = 0; i < row_tiles; ++i) {
            softmax_rows(scores + i * kTileSide * stride, stride, lanes_, factor,
                         inverse + i * kTileSide, ahead);
        }
    }

    double align(int64_t count, const float* inverse, const float* inverse_anchor) const {
        Vec total{};
        // Not the rows of zeros behind them: an infinite key has made NaN of those.
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = r * shape_.key_stride();
            if (r % 8 == 0) keep_awake();
            for (int64_t v = 0; v < shape_.keys; ++v) {
                const int64_t at = row + v * kLanes;
                const Vec target = load(scratch_.target + at) * broadcast(inverse[r]);
                const Vec anchor = load(scratch_.anchor + at) * broadcast(inverse_anchor[r]);
                const Vec difference = target - anchor;
                total = fma(load(weights_ + v * kLanes) * difference, difference, total);
            }
        }
        return double(sum(total));
    }

    void write_maps(int64_t n, int64_t count, const float* inverse) const {
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        const bool add = !call_.probs_all_heads && h_ > 0;
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t token = call_.probs_positions[b_ * call_.probs_positions_batch + t];
            const int64_t m = keys_.find(token, call_.keys);
            float* to = map_row(t) + n;
            for (int64_t i = 0; i < count; ++i) {
                const float* row = scratch_.target + i * shape_.key_stride();
                const float p = m < 0 ? 0.0f : share * (row[m] * inverse[i]);
                to[i] = add ? to[i] + p : p;
            }
        }
    }

    float* map_row(int64_t t) const {
        const int64_t head = call_.probs_all_heads ? b_ * call_.heads + h_ : b_;
        return call_.attn_probs + (head * call_.probs_count + t) * call_.queries;
    }

    void fill_zeros(int64_t begin, int64_t end) const {
        for (int64_t n = begin; n < end; ++n) {
            char* row = call_.output.at(call_.dtype, b_, h_, n);
            __builtin_memset(row, 0, size_t(call_.head_dim * item_size(call_.dtype)));
        }
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            __builtin_memset(map_row(t) + begin, 0, size_t(4 * (end - begin)));
        }
    }

    const ForwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const DotShape shape_;
    const KeyLanes lanes_;
    const Scratch scratch_;
    float weights_[kMaxKeys];
    const MatrixUnit unit_;
};

}  // namespace SEFI_ISA
}  // namespace sefi
