// Backward of one head for a range of query rows, with products of bfloat16 parts.
#pragma once

#include "cpu/bf16_fwd.h"

namespace sefi {
namespace SEFI_ISA {

template <int kParts>
class Bf16Backward {
public:
    Bf16Backward(const BackwardCall& call, int64_t b, int64_t h, char* memory)
        : call_(call), b_(b), h_(h), keys_(call, b), shape_(call, keys_.count), lanes_(keys_.count),
          scratch_(call, shape_, memory) {
        float* const all_sums[] = {scratch_.grad_key, scratch_.grad_value, scratch_.grad_reference};
        for (float* sums : all_sums) {
            if (sums)
                __builtin_memset(sums, 0, size_t(4 * shape_.key_stride() * shape_.row_stride()));
        }
        if (keys_.count == 0) return;
        const float sign = ScoreScale(call.scale).sign;
        if (call.grad_output.data) {
            pack(call.value, scratch_.key_rows);
            transpose_rows<kParts>(scratch_.key_rows, scratch_.value, 1.0f);
        }
        if (call.with_reference()) {
            const LeftTiles& rows =
                with_ref_gradient() ? scratch_.reference_rows : scratch_.key_rows;
            pack(call.reference_key, rows);
            transpose_rows<kParts>(rows, scratch_.reference, sign);
            if (with_ref_gradient()) interleave_all<kParts>(rows);
            __builtin_memset(loss_factor_, 0, sizeof loss_factor_);
            load_loss_factors(call, b, keys_, loss_factor_);
        }
        pack(call.key, scratch_.key_rows);
        transpose_rows<kParts>(scratch_.key_rows, scratch_.key, sign);
        interleave_all<kParts>(scratch_.key_rows);
    }

    void run(int64_t begin, int64_t end, const KeyGradients& gradients) {
        if (keys_.count == 0) zero_rows(call_.grad_query, call_, b_, h_, begin, end);
        for (int64_t n = begin; keys_.count && n < end;) {
            int64_t pair = 0;
            for (; pair < kPairs && n < end; ++pair, n += kPairRows) {
                rows(n, end, pair);
            }
            accumulate(scratch_.d_scores_t, scratch_.query, pair, scratch_.grad_key);
            if (call_.grad_output.data) {
                accumulate(scratch_.probs_t, scratch_.grad_output, pair, scratch_.grad_value);
            }
            accumulate(scratch_.ref_d_scores_t, scratch_.query, pair, scratch_.grad_reference);
        }
        const auto store = [&](const float* sums, float factor, const KeyGradient& to) {
            store_key_gradient(sums, shape_.row_stride(), call_, keys_, factor, to);
        };
        store(scratch_.grad_key, call_.scale, gradients.key);
        store(scratch_.grad_value, 1.0f, gradients.value);
        store(scratch_.grad_reference, call_.scale, gradients.reference_key);
    }

    static size_t scratch_bytes(const BackwardCall& call) {
        return Scratch(call, Bf16Shape(call, call.keys), nullptr).bytes;
    }

private:
    // Pairs of row tiles in a block; sums over query rows are stored once per block.
    static constexpr int64_t kPairs = kParts == 1 ? 2 : 1;

    struct Scratch {
        Scratch(const BackwardCall& p, const Bf16Shape& shape, char* memory) {
            Arena arena(memory);
            const int64_t key_pairs = tiles(shape.keys, 2);
            const bool with_ref_gradient = p.reference_grad && p.with_reference();
            key = shape.by_width(arena, kParts);
            key_rows = shape.key_rows(arena, kParts);
            query = shape.left(arena, kParts, kPairs, shape.width_terms);
            packed = shape.left(arena, kParts, 1, shape.key_terms);
            probs = arena.floats(kPairRows * shape.key_stride());
            d_probs = arena.floats(kPairRows * shape.key_stride());
            if (p.grad_output.data) {
                value = shape.by_width(arena, kParts);
                grad_output = shape.left(arena, kParts, kPairs, shape.width_terms);
            }
            if (p.with_reference()) {
                reference = shape.by_width(arena, kParts);
                ref_probs = arena.floats(kPairRows * shape.key_stride());
            }
            if (with_ref_gradient) reference_rows = shape.key_rows(arena, kParts);
            if (p.grad_query.data) grad_query = arena.floats(kPairRows * shape.row_stride());
            const int64_t sums = shape.key_stride() * shape.row_stride();
            if (p.grad_key.data) {
                grad_key = arena.floats(sums);
                d_scores_t = shape.left(arena, kParts, key_pairs, kPairs);
            }
            if (p.grad_value.data) {
                grad_value = arena.floats(sums);
                probs_t = shape.left(arena, kParts, key_pairs, kPairs);
            }
            if (p.grad_reference_key.data) {
                grad_reference = arena.floats(sums);
                ref_d_scores_t = shape.left(arena, kParts, key_pairs, kPairs);
            }
            bytes = arena.used();
        }
        RightTiles key, value, reference;
        LeftTiles key_rows, reference_rows;  // interleaved
        LeftTiles query,
            grad_output;   // a block of rows, interleaved after their scores are computed
        LeftTiles packed;  // of a pair of row tiles: A_t, dS_t, dS_r in turn
        LeftTiles probs_t, d_scores_t, ref_d_scores_t;  // their transposes for a block of rows
        float *probs, *d_probs, *ref_probs = nullptr;   // A_t; dA_t; A_r
        float* grad_query = nullptr;
        float *grad_key = nullptr, *grad_value = nullptr, *grad_reference = nullptr;
        size_t bytes;
    };

    bool with_ref_gradient() const { return call_.reference_grad && call_.with_reference(); }

    void pack(const View& view, const LeftTiles& to) const {
        pack_key_rows<kParts>(view, call_.dtype, b_, h_, keys_, call_.head_dim, to);
    }

    void rows(int64_t n, int64_t end, int64_t pair) {
        const int64_t count = end - n < kPairRows ? end - n : kPairRows;
        const int64_t row_tiles = tiles(count, kTileSide);
        float inv_sum[kPairRows], ref_inv_sum[kPairRows], delta[kPairRows];
        pack_query_rows<kParts>(call_.query, call_.dtype, b_, h_, n, count, call_.head_dim,
                                scratch_.query, pair);
        Prefetcher prefetcher;
        const int64_t next = end - n - count < kPairRows ? end - n - count : kPairRows;
        prefetcher.add(call_.grad_output, call_.dtype, b_, h_, n, count, call_.head_dim);
        prefetcher.add(call_.grad_query, call_.dtype, b_, h_, n, count, call_.head_dim);
        prefetcher.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        probabilities(scratch_.key, pair, row_tiles, scratch_.probs, inv_sum, prefetcher);
        if (call_.with_reference()) {
            probabilities(scratch_.reference, pair, row_tiles, scratch_.ref_probs, ref_inv_sum,
                          prefetcher);
        }
        if (call_.grad_output.data) {
            pack_query_rows<kParts>(call_.grad_output, call_.dtype, b_, h_, n, count,
                                    call_.head_dim, scratch_.grad_output, pair);
            multiply<kParts>(scratch_.grad_output, 2 * pair, row_tiles, scratch_.value, shape_.keys,
                             shape_.width_terms, scratch_.d_probs, shape_.key_stride(), false);
        } else {
            __builtin_memset(scratch_.d_probs, 0, size_t(4 * kPairRows * shape_.key_stride()));
        }
        if (call_.probs_count && call_.grad_attn_probs) add_probs_grads(n, count);
        for (int64_t i = 0; i < row_tiles; ++i) {
            const int64_t first = i * kTileSide;
            if (call_.with_reference()) {
                probability_gradients<true>(first, inv_sum, ref_inv_sum, delta, prefetcher);
            } else {
                probability_gradients<false>(first, inv_sum, ref_inv_sum, delta, prefetcher);
            }
        }
        if (scratch_.grad_value) {
            pack_rows(count, [&](int64_t, int64_t at, int64_t) __attribute__((always_inline)) {
                return load(scratch_.probs + at);
            });
            transpose_packed(scratch_.probs_t, pair);
        }
        // dS = A (dA - delta)
        pack_rows(count, [&](int64_t r, int64_t at, int64_t) __attribute__((always_inline)) {
            return load(scratch_.probs + at) * (load(scratch_.d_probs + at) - broadcast(delta[r]));
        });
        multiply_query(scratch_.key_rows, row_tiles, false);
        if (scratch_.grad_key) transpose_packed(scratch_.d_scores_t, pair);
        if (with_ref_gradient()) {
            for (int64_t i = 0; i < row_tiles; ++i) ref_delta(i * kTileSide, delta);
            pack_rows(count, [&](int64_t r, int64_t at, int64_t v) __attribute__((always_inline)) {
                const Vec ref_probs = load(scratch_.ref_probs + at);
                return ref_probs * (ref_d_probs(at, v, ref_probs) - broadcast(delta[r]));
            });
            multiply_query(scratch_.reference_rows, row_tiles, true);
            if (scratch_.grad_reference) transpose_packed(scratch_.ref_d_scores_t, pair);
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
                       float* inv_sum, Prefetcher& prefetcher) {
        const int64_t stride = shape_.key_stride();
        multiply<kParts>(scratch_.query, 2 * pair, row_tiles, key, shape_.keys, shape_.width_terms,
                         scores, stride, false);
        for (int64_t i = 0; i < row_tiles; ++i) {
            softmax_rows(scores + i * kTileSide * stride, stride, lanes_,
                         ScoreScale(call_.scale).sm_scale_log2, inv_sum + i * kTileSide,
                         prefetcher);
        }
    }

    // Divide A_t and A_r; dA_t += loss_factor (A_t - A_r); delta = rowsum(A_t dA_t).
    template <bool kReference>
    void probability_gradients(int64_t first, const float* inv_sum, const float* ref_inv_sum,
                               float* delta, Prefetcher& prefetcher) {
        Vec sums[kTileSide];
        for (int64_t r = 0; r < kTileSide; ++r) {
            const int64_t row = (first + r) * shape_.key_stride();
            if (r % 4 == 0) prefetcher.step();
            if (r % 8 == 0) keep_awake();
            Vec total{};
            for (int64_t v = 0; v < shape_.keys; ++v) {
                const int64_t at = row + v * kLanes;
                const Vec p = load(scratch_.probs + at) * broadcast(inv_sum[first + r]);
                Vec d_probs = load(scratch_.d_probs + at);
                if constexpr (kReference) {
                    const Vec ref_probs =
                        load(scratch_.ref_probs + at) * broadcast(ref_inv_sum[first + r]);
                    d_probs = fma(load(loss_factor_ + v * kLanes), p - ref_probs, d_probs);
                    if (call_.reference_grad) store(scratch_.ref_probs + at, ref_probs);
                }
                total = fma(p, d_probs, total);
                store(scratch_.probs + at, p);
                store(scratch_.d_probs + at, d_probs);
            }
            sums[r] = total;
        }
        store(delta + first, sum_lanes(sums));
    }

    // dA_r = -loss_factor (A_t - A_r)
    SEFI_INLINE Vec ref_d_probs(int64_t at, int64_t v, Vec ref_probs) const {
        return load(loss_factor_ + v * kLanes) * (ref_probs - load(scratch_.probs + at));
    }

    void ref_delta(int64_t first, float* delta) const {
        Vec sums[kTileSide];
        for (int64_t r = 0; r < kTileSide; ++r) {
            const int64_t row = (first + r) * shape_.key_stride();
            Vec total{};
            for (int64_t v = 0; v < shape_.keys; ++v) {
                const Vec ref_probs = load(scratch_.ref_probs + row + v * kLanes);
                total = fma(ref_probs, ref_d_probs(row + v * kLanes, v, ref_probs), total);
            }
            sums[r] = total;
        }
        store(delta + first, sum_lanes(sums));
    }

    void add_probs_grads(int64_t n, int64_t count) {
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t m = keys_.find_column(call_, b_, t);
            if (m < 0) continue;
            const float* from = call_.grad_attn_probs + probs_offset(call_, b_, h_, t) + n;
            for (int64_t i = 0; i < count; ++i) {
                scratch_.d_probs[i * shape_.key_stride() + m] += share * from[i];
            }
        }
    }

    // Pack value(row, place, vector) of every vector. Rows past count are zero, because an infinite
    // key or value turns theirs into NaN.
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

    void transpose_packed(const LeftTiles& to, int64_t pair) {
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

    // sums[m][*] += sum over the rows of a block of transposed[m][row] * rows[row][*]
    void accumulate(const LeftTiles& transposed, const LeftTiles& rows, int64_t pairs,
                    float* sums) {
        if (!sums) return;
        multiply<kParts>(transposed, 0, shape_.keys, interleaved(rows), shape_.width, pairs, sums,
                         shape_.row_stride(), true);
    }

    const BackwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const Bf16Shape shape_;
    const KeyLanes lanes_;
    const Scratch scratch_;
    float loss_factor_[kMaxKeys];
    const MatrixUnit unit_;
};

}  // namespace SEFI_ISA
}  // namespace sefi
