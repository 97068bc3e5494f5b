// Forward of one head for a range of query rows, with products of bfloat16 parts.
#pragma once

#include "cpu/bf16_pack.h"
#include "cpu/bf16_softmax.h"

namespace sefi {
namespace SEFI_ISA {

constexpr int64_t kPairRows = 2 * kTileSide;

// Sizes in tiles, and operands of these sizes.
struct Bf16Shape {
    int64_t keys, key_terms, width, width_terms;

    Bf16Shape(const Problem& p, int64_t keys)
        : keys(tiles(keys, kTileSide)), key_terms(tiles(keys, kTileDepth)),
          width(tiles(p.head_dim, kTileSide)), width_terms(tiles(p.head_dim, kTileDepth)) {}

    int64_t key_stride() const { return keys * kTileSide; }
    int64_t row_stride() const { return width * kTileSide; }

    // Columns are keys, terms are columns of the head.
    RightTiles by_width(Arena& arena, int parts) const {
        uint16_t* data = arena.halves(parts * keys * width_terms * kTileElements);
        return {data, keys * width_terms, width_terms, 1};
    }
    LeftTiles left(Arena& arena, int parts, int64_t pairs, int64_t depth) const {
        return {arena.halves(LeftTiles::elements(parts, pairs, depth)), pairs, depth};
    }
    // Rows are keys. Interleaved, the terms are keys.
    LeftTiles key_rows(Arena& arena, int parts) const {
        return left(arena, parts, key_terms, width_terms);
    }
};

template <int kParts>
inline void interleave_all(const LeftTiles& rows) {
    for (int64_t pair = 0; pair < rows.pairs; ++pair) interleave_rows<kParts>(rows, pair);
}

template <int kParts>
class Bf16Forward {
public:
    Bf16Forward(const ForwardCall& call, int64_t b, int64_t h, char* memory)
        : call_(call), b_(b), h_(h), keys_(call, b), shape_(call, keys_.count), lanes_(keys_.count),
          scratch_(call, shape_, memory) {
        if (keys_.count == 0) return;
        const float sign = ScoreScale(call.scale).sign;
        if (call.reference_key.data) {
            pack(call.reference_key, scratch_.value);
            transpose_rows<kParts>(scratch_.value, scratch_.reference, sign);
            __builtin_memset(weights_, 0, sizeof weights_);
            load_token_weights(call, b, keys_, 1.0f, weights_);
        }
        pack(call.key, scratch_.value);
        transpose_rows<kParts>(scratch_.value, scratch_.key, sign);
        pack(call.value, scratch_.value);
        interleave_all<kParts>(scratch_.value);
    }

    double run(int64_t begin, int64_t end) {
        if (keys_.count == 0) {
            zero_outputs(call_, b_, h_, begin, end);
            return 0.0;
        }
        double subject_loss = 0.0;
        for (int64_t n = begin; n < end; n += kPairRows) {
            subject_loss += rows(n, end);
        }
        return subject_loss;
    }

    static size_t scratch_bytes(const Problem& p) {
        return Scratch(p, Bf16Shape(p, p.keys), nullptr).bytes;
    }

private:
    struct Scratch {
        Scratch(const Problem& p, const Bf16Shape& shape, char* memory) {
            Arena arena(memory);
            key = shape.by_width(arena, kParts);
            if (p.reference_key.data) reference = shape.by_width(arena, kParts);
            value = shape.key_rows(arena, kParts);
            query = shape.left(arena, kParts, 1, shape.width_terms);
            probability = shape.left(arena, kParts, 1, shape.key_terms);
            probs = arena.floats(kPairRows * shape.key_stride());
            if (p.reference_key.data) ref_probs = arena.floats(kPairRows * shape.key_stride());
            output = arena.floats(kPairRows * shape.row_stride());
            bytes = arena.used();
        }
        RightTiles key, reference;
        LeftTiles value;  // interleaved
        LeftTiles query, probability;
        float *probs, *ref_probs = nullptr, *output;  // probs, ref_probs: A_t, A_r before division
        size_t bytes;
    };

    void pack(const View& view, const LeftTiles& to) const {
        pack_key_rows<kParts>(view, call_.dtype, b_, h_, keys_, call_.head_dim, to);
    }

    double rows(int64_t n, int64_t end) {
        const int64_t count = end - n < kPairRows ? end - n : kPairRows;
        const int64_t row_tiles = tiles(count, kTileSide), stride = shape_.key_stride();
        const float sm_scale_log2 = ScoreScale(call_.scale).sm_scale_log2;
        pack_query_rows<kParts>(call_.query, call_.dtype, b_, h_, n, count, call_.head_dim,
                                scratch_.query, 0);
        Prefetcher prefetcher;
        const int64_t next = end - n - count < kPairRows ? end - n - count : kPairRows;
        prefetcher.add(call_.output, call_.dtype, b_, h_, n, count, call_.head_dim);
        prefetcher.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        float inv_sum[kPairRows], ref_inv_sum[kPairRows];
        probabilities(scratch_.key, row_tiles, sm_scale_log2, scratch_.probs, inv_sum, prefetcher);
        for (int64_t r = 0; r < row_tiles * kTileSide; ++r) {
            const float* row = scratch_.probs + r * stride;
            pack_values<kParts>(
                shape_.keys, scratch_.probability, r,
                [&](int64_t v) __attribute__((always_inline)) { return load(row + v * kLanes); });
        }
        multiply<kParts>(scratch_.probability, 0, row_tiles, interleaved(scratch_.value),
                         shape_.width, shape_.key_terms, scratch_.output, shape_.row_stride(),
                         false);
        for (int64_t i = 0; i < count; ++i) {
            if (i % kTileSide == 0) keep_awake();
            store_row(scratch_.output + i * shape_.row_stride(), call_.head_dim, inv_sum[i],
                      call_.output.at(call_.dtype, b_, h_, n + i), call_.dtype);
        }
        if (call_.probs_count) write_probs(n, count, inv_sum);
        if (!call_.reference_key.data) return 0.0;
        probabilities(scratch_.reference, row_tiles, sm_scale_log2, scratch_.ref_probs, ref_inv_sum,
                      prefetcher);
        return tile_loss(count, inv_sum, ref_inv_sum);
    }

    void probabilities(const RightTiles& key, int64_t row_tiles, float sm_scale_log2, float* scores,
                       float* inv_sum, Prefetcher& prefetcher) {
        const int64_t stride = shape_.key_stride();
        multiply<kParts>(scratch_.query, 0, row_tiles, key, shape_.keys, shape_.width_terms, scores,
                         stride, false);
        for (int64_t i = 0; i < row_tiles; ++i) {
            softmax_rows(scores + i * kTileSide * stride, stride, lanes_, sm_scale_log2,
                         inv_sum + i * kTileSide, prefetcher);
        }
    }

    double tile_loss(int64_t count, const float* inv_sum, const float* ref_inv_sum) const {
        Vec total{};
        // Rows past count are not added, because an infinite key turns their zeros into NaN.
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = r * shape_.key_stride();
            if (r % 8 == 0) keep_awake();
            for (int64_t v = 0; v < shape_.keys; ++v) {
                const int64_t at = row + v * kLanes;
                const Vec probs = load(scratch_.probs + at) * broadcast(inv_sum[r]);
                const Vec ref_probs = load(scratch_.ref_probs + at) * broadcast(ref_inv_sum[r]);
                const Vec difference = probs - ref_probs;
                total = fma(load(weights_ + v * kLanes) * difference, difference, total);
            }
        }
        return double(sum(total));
    }

    void write_probs(int64_t n, int64_t count, const float* inv_sum) const {
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        const bool add = !call_.probs_all_heads && h_ > 0;
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t m = keys_.find_column(call_, b_, t);
            float* to = call_.attn_probs + probs_offset(call_, b_, h_, t) + n;
            for (int64_t i = 0; i < count; ++i) {
                const float* row = scratch_.probs + i * shape_.key_stride();
                const float p = m < 0 ? 0.0f : share * (row[m] * inv_sum[i]);
                to[i] = add ? to[i] + p : p;
            }
        }
    }

    const ForwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const Bf16Shape shape_;
    const KeyLanes lanes_;
    const Scratch scratch_;
    float weights_[kMaxKeys];
    const MatrixUnit unit_;
};

}  // namespace SEFI_ISA
}  // namespace sefi
