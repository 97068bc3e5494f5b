// Backward of one head for a range of query rows by products of bfloat16 parts.
#pragma once

#include "cpu/dot_forward.h"

namespace sefi {
namespace SEFI_ISA {

template <int kParts>
class DotBackward {
public:
    DotBackward(const BackwardCall& call, int64_t b, int64_t h, char* memory)
        : call_(call), b_(b), h_(h), keys_(call, b), shape_(call, keys_.count), lanes_(keys_.count),
          scratch_(call, shape_, memory) {
        float* const all_sums[] = {scratch_.grad_key, scratch_.grad_value, scratch_.grad_reference};
        for (float* sums : all_sums) {
            if (sums) __builtin_memset(sums, 0, size_t(4 * shape_.key_stride() * shape_.row_stride()));
        }
        if (keys_.count == 0) return;
        const float sign = ScoreScale(call.scale).sign;
        if (call.grad_output.data) {
            pack(call.value, scratch_.key_rows);
            transpose_rows<kParts>(scratch_.key_rows, scratch_.value, 1.0f);
        }
        if (call.with_reference()) {
            const LeftTiles& rows = through_reference() ? scratch_.reference_rows : scratch_.key_rows;
            pack(call.reference_key, rows);
            transpose_rows<kParts>(rows, scratch_.reference, sign);
            if (through_reference()) interleave_all<kParts>(rows);
            // The factor of A_t - A_r in the gradient of the subject loss: 2 g w, mean over heads.
            const float factor = 2.0f * call.grad_subject_loss[b] / float(call.heads);
            __builtin_memset(pull_, 0, sizeof pull_);
            for (int64_t m = 0; m < keys_.count; ++m) {
                const float* weights = call.token_weights;
                const int64_t at = b * call.token_weights_batch + keys_.index[m];
                pull_[m] = factor * (weights ? weights[at] : 1.0f);
            }
        }
        pack(call.key, scratch_.key_rows);
        transpose_rows<kParts>(scratch_.key_rows, scratch_.key, sign);
        interleave_all<kParts>(scratch_.key_rows);
    }

    void run(int64_t begin, int64_t end, const KeyGradients& gradients) {
        if (keys_.count == 0) {
            for (int64_t n = begin; call_.grad_query.data && n < end; ++n) {
                char* row = call_.grad_query.at(call_.dtype, b_, h_, n);
                __builtin_memset(row, 0, size_t(call_.head_dim * item_size(call_.dtype)));
            }
        }
        for (int64_t n = begin; keys_.count && n < end;) {
            int64_t pair = 0;
            for (; pair < kPairs && n < end; ++pair, n += kPairRows) {
                rows(n, end, pair);
            }
            accumulate(scratch_.slopes, scratch_.query, pair, scratch_.grad_key);
            if (call_.grad_output.data) {
                accumulate(scratch_.targets, scratch_.grad_output, pair, scratch_.grad_value);
            }
            accumulate(scratch_.anchors, scratch_.query, pair, scratch_.grad_reference);
        }
        hand_over(scratch_.grad_key, gradients.key, call_.scale);
        hand_over(scratch_.grad_value, gradients.value, 1.0f);
        hand_over(scratch_.grad_reference, gradients.reference_key, call_.scale);
    }

    static size_t scratch_bytes(const BackwardCall& call) {
        return Scratch(call, DotShape(call, call.keys), nullptr).bytes;
    }

private:
    // Sums over query rows go to memory once in so many pairs of row tiles.
    static constexpr int64_t kPairs = kParts == 1 ? 2 : 1;

    struct Scratch {
        Scratch(const BackwardCall& p, const DotShape& shape, char* memory) {
            Arena arena(memory);
            const int64_t key_pairs = tiles(shape.keys, 2);
            const bool through_reference = p.reference_grad && p.with_reference();
            key = shape.by_width(arena, kParts);
            key_rows = shape.key_rows(arena, kParts);
            query = shape.left(arena, kParts, kPairs, shape.width_terms);
            packed = shape.left(arena, kParts, 1, shape.key_terms);
            target = arena.floats(kPairRows * shape.key_stride());
            slope = arena.floats(kPairRows * shape.key_stride());
            if (p.grad_output.data) {
                value = shape.by_width(arena, kParts);
                grad_output = shape.left(arena, kParts, kPairs, shape.width_terms);
            }
            if (p.with_reference()) {
                reference = shape.by_width(arena, kParts);
                anchor = arena.floats(kPairRows * shape.key_stride());
            }
            if (through_reference) reference_rows = shape.key_rows(arena, kParts);
            if (p.grad_query.data) grad_query = arena.floats(kPairRows * shape.row_stride());
            const int64_t sums = shape.key_stride() * shape.row_stride();
            if (p.grad_key.data) {
                grad_key = arena.floats(sums);
                slopes = shape.left(arena, kParts, key_pairs, kPairs);
            }
            if (p.grad_value.data) {
                grad_value = arena.floats(sums);
                targets = shape.left(arena, kParts, key_pairs, kPairs);
            }
            if (p.grad_reference_key.data) {
                grad_reference = arena.floats(sums);
                anchors = shape.left(arena, kParts, key_pairs, kPairs);
            }
            bytes = arena.used();
        }
        RightTiles key, value, reference;
        LeftTiles key_rows, reference_rows;  // interleaved
        LeftTiles query, grad_output;        // a block of rows, interleaved once their scores are known
        LeftTiles packed;                    // of a pair of row tiles, in turn: A_t, dS_t, dS_r
        LeftTiles targets, slopes, anchors;  // transposes of these for a block of rows
        float *target, *slope, *anchor = nullptr;  // A_t; dA_t; A_r
        float *grad_query = nullptr;
        float *grad_key = nullptr, *grad_value = nullptr, *grad_reference = nullptr;
        size_t bytes;
    };

    bool through_reference() const { return call_.reference_grad && call_.with_reference(); }

    void pack(const View& view, const LeftTiles& to) const {
        pack_key_rows<kParts>(view, call_.dtype, b_, h_, keys_, call_.head_dim, to);
    }

    void rows(int64_t n, int64_t end, int64_t pair) {
        const int64_t count = end - n < kPairRows ? end - n : kPairRows;
        const int64_t row_tiles = tiles(count, kTileSide);
        float inverse[kPairRows], inverse_anchor[kPairRows], row_sum[kPairRows];
        pack_query_rows<kParts>(call_.query, call_.dtype, b_, h_, n, count, call_.head_dim,
                                scratch_.query, pair);
        Ahead ahead;
        const int64_t next = end - n - count < kPairRows ? end - n - count : kPairRows;
        ahead.add(call_.grad_output, call_.dtype, b_, h_, n, count, call_.head_dim);
        ahead.add(call_.grad_query, call_.dtype, b_, h_, n, count, call_.head_dim);
        ahead.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        probabilities(scratch_.key, pair, row_tiles, scratch_.target, inverse, ahead);
        if (call_.with_reference()) {
            probabilities(scratch_.reference, pair, row_tiles, scratch_.anchor, inverse_anchor, ahead);
        }
        if (call_.grad_output.data) {
            pack_query_rows<kParts>(call_.grad_output, call_.dtype, b_, h_, n, count, call_.head_dim,
                                    scratch_.grad_output, pair);
            multiply<kParts>(scratch_.grad_output, 2 * pair, row_tiles, scratch_.value, shape_.keys,
                             shape_.width_terms, scratch_.slope, shape_.key_stride(), false);
        } else {
            __builtin_memset(scratch_.slope, 0, size_t(4 * kPairRows * shape_.key_stride()));
        }
        if (call_.probs_count && call_.grad_attn_probs) add_map_gradients(n, count);
        for (int64_t i = 0; i < row_tiles; ++i) {
            const int64_t first = i * kTileSide;
            if (call_.with_reference()) {
                slopes<true>(first, inverse, inverse_anchor, row_sum, ahead);
            } else {
                slopes<false>(first, inverse, inverse_anchor, row_sum, ahead);
            }
        }
        if (scratch_.grad_value) {
            pack_rows(count, [&](int64_t, int64_t at, int64_t) __attribute__((always_inline)) {
                return load(scratch_.target + at);
            });
            turn(scratch_.targets, pair);
        }
        // dS = A (dA - rowsum(A dA))
        pack_rows(count, [&](int64_t r, int64_t at, int64_t) __attribute__((always_inline)) {
            return load(scratch_.target + at) * (load(scratch_.slope + at) - broadcast(row_sum[r]));
        });
        multiply_query(scratch_.key_rows, row_tiles, false);
        if (scratch_.grad_key) turn(scratch_.slopes, pair);
        if (through_reference()) {
            for (int64_t i = 0; i < row_tiles; ++i) reference_sums(i * kTileSide, row_sum);
            pack_rows(count, [&](int64_t r, int64_t at, int64_t v) __attribute__((always_inline)) {
                const Vec anchor = load(scratch_.anchor + at);
                return anchor * (reference_slope(at, v, anchor) - broadcast(row_sum[r]));
            });
            multiply_query(scratch_.reference_rows, row_tiles, true);
            if (scratch_.grad_reference) turn(scratch_.anchors, pair);
        }
        for (int64_t i = 0; call_.grad_query.data && i < count; ++i) {
            if (i % kTileSide == 0) keep_awake();
            store_row(scratch_.grad_query + i * shape_.row_stride(), call_.head_dim, call_.scale,
                      call_.grad_query.at(call_.dtype, b_, h_, n + i), call_.dtype);
        }
        keep_awake();
        interleave_rows<kParts>(scratch_.query, pair);
        keep_awake();
        if (call_.grad_output.data) interleave_rows<kParts>(scratch_.grad_output, pair);
    }

    void probabilities(const RightTiles& key, int64_t pair, int64_t row_tiles, float* scores,
                       float* inverse, Ahead& ahead) {
        const int64_t stride = shape_.key_stride();
        multiply<kParts>(scratch_.query, 2 * pair, row_tiles, key, shape_.keys, shape_.width_terms,
                         scores, stride, false);
        for (int64_t i = 0; i < row_tiles; ++i) {
            softmax_rows(scores + i * kTileSide * stride, stride, lanes_,
                         ScoreScale(call_.scale).factor, inverse + i * kTileSide,
                         ahead);
        }
    }

    // A_t, A_r, dA_t = dO V^T + pull (A_t - A_r) + the chosen columns' gradients, rowsum(A_t dA_t).
    template <bool kReference>
    void slopes(int64_t first, const float* inverse, const float* inverse_anchor, float* row_sum,
                Ahead& ahead) {
        Vec sums[kTileSide];
        for (int64_t r = 0; r < kTileSide; ++r) {
            const int64_t row = (first + r) * shape_.key_stride();
            if (r % 4 == 0) ahead.step();
            if (r % 8 == 0) keep_awake();
            Vec total{};
            for (int64_t v = 0; v < shape_.keys; ++v) {
                const int64_t at = row + v * kLanes;
                const Vec p = load(scratch_.target + at) * broadcast(inverse[first + r]);
                Vec slope = load(scratch_.slope + at);
                if constexpr (kReference) {
                    const Vec anchor = load(scratch_.anchor + at) * broadcast(inverse_anchor[first + r]);
                    slope = fma(load(pull_ + v * kLanes), p - anchor, slope);
                    if (call_.reference_grad) store(scratch_.anchor + at, anchor);
                }
                total = fma(p, slope, total);
                store(scratch_.target + at, p);
                store(scratch_.slope + at, slope);
            }
            sums[r] = total;
        }
        store(row_sum + first, sum_across(sums));
    }

    // dA_r = -pull (A_t - A_r)
    SEFI_INLINE Vec reference_slope(int64_t at, int64_t v, Vec anchor) const {
        return load(pull_ + v * kLanes) * (anchor - load(scratch_.target + at));
    }

    void reference_sums(int64_t first, float* row_sum) const {
        Vec sums[kTileSide];
        for (int64_t r = 0; r < kTileSide; ++r) {
            const int64_t row = (first + r) * shape_.key_stride();
            Vec total{};
            for (int64_t v = 0; v < shape_.keys; ++v) {
                const Vec anchor = load(scratch_.anchor + row + v * kLanes);
                total = fma(anchor, reference_slope(row + v * kLanes, v, anchor), total);
            }
            sums[r] = total;
        }
        store(row_sum + first, sum_across(sums));
    }

    void add_map_gradients(int64_t n, int64_t count) {
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        const int64_t head = call_.probs_all_heads ? b_ * call_.heads + h_ : b_;
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t token = call_.probs_positions[b_ * call_.probs_positions_batch + t];
            const int64_t m = keys_.find(token, call_.keys);
            if (m < 0) continue;
            const float* from = call_.grad_attn_probs + (head * call_.probs_count + t) * call_.queries + n;
            for (int64_t i = 0; i < count; ++i) {
                scratch_.slope[i * shape_.key_stride() + m] += share * from[i];
            }
        }
    }

    // value(row, place, vector) of every vector to scratch_.packed; rows behind are zero, for an infinite
    // key or value has made NaN of theirs.
    template <class Value>
    void pack_rows(int64_t count, const Value& value) {
        for (int64_t r = 0; r < count; ++r) {
            const int64_t row = r * shape_.key_stride();
            pack_values<kParts>(shape_.keys, scratch_.packed, r,
                                [&](int64_t v) __attribute__((always_inline)) {
                                    return value(r, row + v * kLanes, v);
                                });
        }
        for (int64_t r = count; r < kPairRows; ++r) {
            pack_row<kParts>(nullptr, 0, scratch_.packed, r);
        }
    }

    void turn(const LeftTiles& to, int64_t pair) {
        keep_awake();
        interleave_rows<kParts>(scratch_.packed, 0);
        keep_awake();
        transpose_interleaved<kParts>(scratch_.packed, shape_.keys, to, pair);
    }

    void multiply_query(const LeftTiles& keys, int64_t row_tiles, bool add) {
        if (!call_.grad_query.data) return;
        multiply<kParts>(scratch_.packed, 0, row_tiles, interleaved(keys), shape_.width,
                         shape_.key_terms, scratch_.grad_query, shape_.row_stride(), add);
    }

    // sums[m][*] += sum over a block's rows of turned[m][row] * rows[row][*]
    void accumulate(const LeftTiles& turned, const LeftTiles& rows, int64_t pairs, float* sums) {
        if (!sums) return;
        multiply<kParts>(turned, 0, shape_.keys, interleaved(rows), shape_.width, pairs, sums,
                         shape_.row_stride(), true);
    }

    // The sums of all keys, zeros for the masked ones.
    void hand_over(const float* sums, const KeyGradient& to, float factor) {
        if (!sums) return;
        for (int64_t m = 0; m < call_.keys; ++m) {
            char* row = to.data + item_size(to.dtype) * m * to.row;
            if (keys_.position[m] < 0) {
                __builtin_memset(row, 0, size_t(call_.head_dim * item_size(to.dtype)));
            } else {
                store_row(sums + keys_.position[m] * shape_.row_stride(), call_.head_dim, factor, row,
                          to.dtype);
            }
        }
    }

    const BackwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const DotShape shape_;
    const KeyLanes lanes_;
    const Scratch scratch_;
    float pull_[kMaxKeys];
    const MatrixUnit unit_;
};

}  // namespace SEFI_ISA
}  // namespace sefi
