// Backward of one head for a range of query rows, by recomputation from the inputs alone.
#pragma once

#include "cpu/forward_unit.h"

namespace sefi {
namespace SEFI_ISA {

class BackwardUnit {
public:
    BackwardUnit(const BackwardCall& call, int64_t b, int64_t h, char* memory)
        : call_(call), b_(b), h_(h), keys_(call, b), scratch_(call, memory) {
        pack_keys(call.key, call.dtype, b, h, keys_, call.head_dim, scratch_.key);
        value_ = key_rows(call.value, call.dtype, b, h, keys_, call, scratch_.value);
        float* const all_sums[] = {scratch_.grad_key, scratch_.grad_value, scratch_.grad_reference};
        for (float* sums : all_sums) {
            if (sums) __builtin_memset(sums, 0, size_t(4 * call.keys * scratch_.width));
        }
        if (!call.with_reference()) return;
        if (call.reference_grad) {
            pack_keys(call.reference_key, call.dtype, b, h, keys_, call.head_dim, scratch_.reference);
            reference_ = {scratch_.reference, call.head_dim};
        } else {
            reference_ = key_rows(call.reference_key, call.dtype, b, h, keys_, call,
                                  scratch_.reference);
        }
        // The factor of A_t - A_r in the gradient of the subject loss: 2 g w, mean over heads.
        const float factor = 2.0f * call.grad_subject_loss[b] / float(call.heads);
        for (int64_t m = 0; m < keys_.count; ++m) {
            const float* weights = call.token_weights;
            const float weight = weights ? weights[b * call.token_weights_batch + keys_.index[m]] : 1.0f;
            pull_[m] = factor * weight;
        }
    }

    void run(int64_t begin, int64_t end, const KeyGradients& gradients) {
        if (keys_.count == 0) {
            for (int64_t n = begin; call_.grad_query.data && n < end; ++n) {
                char* row = call_.grad_query.at(call_.dtype, b_, h_, n);
                __builtin_memset(row, 0, size_t(call_.head_dim * item_size(call_.dtype)));
            }
        }
        for (int64_t n = begin; keys_.count && n < end;) {
            if (end - n > kTileVectors / 2 * kLanes) {
                tile<kTileVectors>(n, end);
                n += kTileVectors * kLanes;
            } else {
                tile<1>(n, end);
                n += kLanes;
            }
        }
        hand_over(scratch_.grad_key, gradients.key, call_.scale);
        hand_over(scratch_.grad_value, gradients.value, 1.0f);
        hand_over(scratch_.grad_reference, gradients.reference_key, call_.scale);
    }

    static size_t scratch_bytes(const BackwardCall& call) { return Scratch(call, nullptr).bytes; }

private:
    struct Scratch {
        Scratch(const BackwardCall& p, char* memory) {
            Arena arena(memory);
            width = round_up(p.head_dim, kLanes);
            key = arena.floats(packed_floats(p));
            value = arena.floats(packed_floats(p));
            const bool whole = p.head_dim % kLanes == 0 && p.queries % kMaxTileRows == 0;
            if (p.dtype != DType::float32 || !whole) {
                query_rows = arena.floats(kMaxTileRows * width);
                output_rows = arena.floats(kMaxTileRows * width);
            }
            columns = arena.floats(kMaxTileRows * width);
            target = arena.floats(p.keys * kMaxTileRows);
            slope = arena.floats(p.keys * kMaxTileRows);
            if (p.with_reference()) {
                reference = arena.floats(packed_floats(p));
                anchor = arena.floats(p.keys * kMaxTileRows);
            }
            if (p.grad_key.data) grad_key = arena.floats(p.keys * width);
            if (p.grad_value.data) grad_value = arena.floats(p.keys * width);
            if (p.grad_reference_key.data) grad_reference = arena.floats(p.keys * width);
            bytes = arena.used();
        }
        int64_t width;
        float *key, *value, *reference = nullptr;
        float *query_rows = nullptr, *output_rows = nullptr;
        float* columns;           // of the query, of grad_output, of grad_query
        float *target, *slope;    // A_t; dA_t and then dS_t
        float* anchor = nullptr;  // A_r, and then dS_r
        float *grad_key = nullptr, *grad_value = nullptr, *grad_reference = nullptr;
        size_t bytes;
    };

    // A tile's rows in float32: where they are, or widened and filled up with zeros.
    Rows rows(const View& view, int64_t n, int64_t count, int64_t tile_rows, float* staging) const {
        // Behind a row accumulate() reads up to a whole vector, into columns of sums that nobody
        // wants: of the next head or row, which the tensor's last rows do not have.
        const int64_t behind = scratch_.width - call_.head_dim;
        if (call_.dtype == DType::float32 && call_.head_dim % 4 == 0 && count == tile_rows &&
            (behind == 0 || (n + count < call_.queries && view.row >= behind))) {
            return {reinterpret_cast<const float*>(view.at(call_.dtype, b_, h_, n)), view.row};
        }
        load_rows(view, call_.dtype, b_, h_, n, count, tile_rows, call_.head_dim, scratch_.width,
                  staging);
        return {staging, scratch_.width};
    }

    template <int J>
    void tile(int64_t n, int64_t end) {
        constexpr int64_t kRows = J * kLanes;
        const int64_t count = end - n < kRows ? end - n : kRows;
        const ScoreScale scale(call_.scale);
        const int64_t padded = round_up(call_.head_dim, 4);
        const Rows query = rows(call_.query, n, count, kRows, scratch_.query_rows);
        rows_to_columns<J>(query.data, query.stride, padded, scale.sign, scratch_.columns);
        Ahead ahead;
        const int64_t next = end - n - count < kRows ? end - n - count : kRows;
        ahead.add(call_.grad_output, call_.dtype, b_, h_, n, count, call_.head_dim);
        ahead.add(call_.grad_query, call_.dtype, b_, h_, n, count, call_.head_dim);
        ahead.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        Vec inverse[J], inverse_anchor[J] = {}, row_sum[J] = {};
        const Rows key{scratch_.key, call_.head_dim};
        softmax_tile<J>(key, keys_.count, call_.head_dim, scratch_.columns, scale.factor,
                        scratch_.target, inverse, ahead);
        if (call_.with_reference()) {
            softmax_tile<J>(reference_, keys_.count, call_.head_dim, scratch_.columns, scale.factor,
                            scratch_.anchor, inverse_anchor, ahead);
        }
        Rows grad_output{nullptr, 0};
        if (call_.grad_output.data) {
            grad_output = rows(call_.grad_output, n, count, kRows, scratch_.output_rows);
            rows_to_columns<J>(grad_output.data, grad_output.stride, padded, 1.0f, scratch_.columns);
        }
        if (call_.with_reference()) {
            slopes<J, true>(n, count, inverse, inverse_anchor, row_sum, ahead);
        } else {
            slopes<J, false>(n, count, inverse, inverse_anchor, row_sum, ahead);
        }
        score_gradients<J>(scratch_.target, scratch_.slope, row_sum);
        if (call_.reference_grad && call_.with_reference()) reference_score_gradients<J>(inverse_anchor);
        accumulate<J>(count, scratch_.slope, query, scratch_.grad_key);
        if (grad_output.data) {
            accumulate<J>(count, scratch_.target, grad_output, scratch_.grad_value);
        }
        accumulate<J>(count, scratch_.anchor, query, scratch_.grad_reference);
        if (call_.grad_query.data) write_grad_query<J>(n, count, ahead);
    }

    // dA_t = dO V^T + pull (A_t - A_r) + the chosen columns' gradients, and rowsum(A_t dA_t).
    template <int J, bool kReference>
    void slopes(int64_t n, int64_t count, const Vec (&inverse)[J], const Vec (&inverse_anchor)[J],
                Vec (&row_sum)[J], Ahead& ahead) {
        constexpr int64_t kRows = J * kLanes;
        const bool with_maps = call_.probs_count && call_.grad_attn_probs;
        if (with_maps) gather_map_gradients<J>(n, count);
        struct State {
            Vec row_sum[J], inverse[J], inverse_anchor[J];
        } state = {};
        for (int j = 0; j < J; ++j) {
            state.inverse[j] = inverse[j];
            state.inverse_anchor[j] = inverse_anchor[j];
        }
        float *const target = scratch_.target, *const anchors = scratch_.anchor;
        float* const slopes = scratch_.slope;
        const float* const pull = pull_;
        const auto visit = [=](int64_t m, const Vec (&products)[J],
                               State& state) __attribute__((always_inline)) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = m * kRows + j * kLanes;
                const Vec p = load(target + at) * state.inverse[j];
                Vec slope = products[j];
                if constexpr (kReference) {
                    const Vec anchor = load(anchors + at) * state.inverse_anchor[j];
                    slope = fma(broadcast(pull[m]), p - anchor, slope);
                }
                if (with_maps) slope += load(slopes + at);
                state.row_sum[j] = fma(p, slope, state.row_sum[j]);
                store(target + at, p);
                store(slopes + at, slope);
            }
        };
        if (call_.grad_output.data) {
            product<J, Scalars::along_rows>(keys_.count, value_.data, value_.stride,
                                            scratch_.columns, kRows, call_.head_dim, state, visit,
                                            &ahead);
        } else {
            const Vec none[J] = {};
            for (int64_t m = 0; m < keys_.count; ++m) visit(m, none, state);
        }
        for (int j = 0; j < J; ++j) row_sum[j] = state.row_sum[j];
    }

    template <int J>
    void gather_map_gradients(int64_t n, int64_t count) {
        constexpr int64_t kRows = J * kLanes;
        __builtin_memset(scratch_.slope, 0, size_t(4 * keys_.count * kRows));
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        const int64_t head = call_.probs_all_heads ? b_ * call_.heads + h_ : b_;
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t token = call_.probs_positions[b_ * call_.probs_positions_batch + t];
            const int64_t m = keys_.find(token, call_.keys);
            if (m < 0) continue;
            const float* from = call_.grad_attn_probs + (head * call_.probs_count + t) * call_.queries + n;
            float* to = scratch_.slope + m * kRows;
            for (int64_t i = 0; i < count; ++i) to[i] += share * from[i];
        }
    }

    // dS = A (dA - rowsum(A dA)), in place of dA.
    template <int J>
    void score_gradients(const float* probability, float* slope, const Vec (&row_sum)[J]) {
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = (m * J + j) * kLanes;
                store(slope + at, load(probability + at) * (load(slope + at) - row_sum[j]));
            }
        }
    }

    // dA_r = -pull (A_t - A_r); dS_r takes the place of A_r.
    template <int J>
    void reference_score_gradients(const Vec (&inverse_anchor)[J]) {
        Vec row_sum[J] = {};
        const auto slope = [&](int64_t m, int64_t at, Vec anchor) {
            return pull_[m] * (anchor - load(scratch_.target + at));
        };
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = (m * J + j) * kLanes;
                const Vec anchor = load(scratch_.anchor + at) * inverse_anchor[j];
                store(scratch_.anchor + at, anchor);
                row_sum[j] += anchor * slope(m, at, anchor);
            }
        }
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = (m * J + j) * kLanes;
                const Vec anchor = load(scratch_.anchor + at);
                store(scratch_.anchor + at, anchor * (slope(m, at, anchor) - row_sum[j]));
            }
        }
    }

    template <int J>
    void write_grad_query(int64_t n, int64_t count, Ahead& ahead) {
        constexpr int64_t kRows = J * kLanes;
        float* columns = scratch_.columns;
        const float scale = call_.scale;
        product<J, Scalars::along_columns>(
            call_.head_dim, scratch_.key, call_.head_dim, scratch_.slope, kRows, keys_.count,
            [=](int64_t d, const Vec (&sums)[J]) __attribute__((always_inline)) {
                for (int j = 0; j < J; ++j) {
                    store(columns + d * kRows + j * kLanes, scale * sums[j]);
                }
            },
            &ahead);
        if (call_.reference_grad && call_.with_reference()) {
            product<J, Scalars::along_columns>(
                call_.head_dim, scratch_.reference, call_.head_dim, scratch_.anchor, kRows,
                keys_.count, [=](int64_t d, const Vec (&sums)[J]) __attribute__((always_inline)) {
                    for (int j = 0; j < J; ++j) {
                        float* at = columns + d * kRows + j * kLanes;
                        store(at, load(at) + scale * sums[j]);
                    }
                });
        }
        if (count == kRows && call_.dtype == DType::float32 && call_.head_dim % 4 == 0) {
            char* rows = call_.grad_query.at(call_.dtype, b_, h_, n);
            columns_to_rows<J>(columns, call_.head_dim, reinterpret_cast<float*>(rows),
                               call_.grad_query.row);
            return;
        }
        // Nothing needs the query's rows after grad_key.
        columns_to_rows<J>(columns, round_up(call_.head_dim, 4), scratch_.query_rows, scratch_.width);
        for (int64_t i = 0; i < count; ++i) {
            store_row(scratch_.query_rows + i * scratch_.width, call_.head_dim, 1.0f,
                      call_.grad_query.at(call_.dtype, b_, h_, n + i), call_.dtype);
        }
    }

    // sums[m][*] += sum over the tile's rows of tile[m][row] * rows[row][*]
    template <int J>
    void accumulate(int64_t count, const float* tile, const Rows& rows, float* sums) {
        if (!sums) return;
        accumulate_product(keys_.count, tile, J * kLanes, rows.data, rows.stride,
                           scratch_.width / kLanes, count, sums);
    }

    // The sums of all keys, zeros for the masked ones.
    void hand_over(const float* sums, const KeyGradient& to, float factor) {
        if (!sums) return;
        for (int64_t m = 0; m < call_.keys; ++m) {
            char* row = to.data + item_size(to.dtype) * m * to.row;
            if (keys_.position[m] < 0) {
                __builtin_memset(row, 0, size_t(call_.head_dim * item_size(to.dtype)));
            } else {
                store_row(sums + keys_.position[m] * scratch_.width, call_.head_dim, factor, row,
                          to.dtype);
            }
        }
    }

    const BackwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const Scratch scratch_;
    Rows value_{nullptr, 0}, reference_{nullptr, 0};
    float pull_[kMaxKeys];
};

}  // namespace SEFI_ISA
}  // namespace sefi
