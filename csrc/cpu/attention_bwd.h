// Backward of one head for a range of query rows; probabilities are recomputed.
#pragma once

#include "cpu/attention_fwd.h"

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
            pack_keys(call.reference_key, call.dtype, b, h, keys_, call.head_dim,
                      scratch_.reference);
            reference_ = {scratch_.reference, call.head_dim};
        } else {
            reference_ =
                key_rows(call.reference_key, call.dtype, b, h, keys_, call, scratch_.reference);
        }
        load_loss_factors(call, b, keys_, loss_factor_);
    }

    void run(int64_t begin, int64_t end, const KeyGradients& gradients) {
        if (keys_.count == 0) zero_rows(call_.grad_query, call_, b_, h_, begin, end);
        for (int64_t n = begin; keys_.count && n < end;) {
            if (end - n > kTileVectors / 2 * kLanes) {
                tile<kTileVectors>(n, end);
                n += kTileVectors * kLanes;
            } else {
                tile<1>(n, end);
                n += kLanes;
            }
        }
        const auto store = [&](const float* sums, float factor, const KeyGradient& to) {
            store_key_gradient(sums, scratch_.width, call_, keys_, factor, to);
        };
        store(scratch_.grad_key, call_.scale, gradients.key);
        store(scratch_.grad_value, 1.0f, gradients.value);
        store(scratch_.grad_reference, call_.scale, gradients.reference_key);
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
            probs = arena.floats(p.keys * kMaxTileRows);
            d_probs = arena.floats(p.keys * kMaxTileRows);
            if (p.with_reference()) {
                reference = arena.floats(packed_floats(p));
                ref_probs = arena.floats(p.keys * kMaxTileRows);
            }
            if (p.grad_key.data) grad_key = arena.floats(p.keys * width);
            if (p.grad_value.data) grad_value = arena.floats(p.keys * width);
            if (p.grad_reference_key.data) grad_reference = arena.floats(p.keys * width);
            bytes = arena.used();
        }
        int64_t width;
        float *key, *value, *reference = nullptr;
        float *query_rows = nullptr, *output_rows = nullptr;
        float* columns;              // of query, grad_output and grad_query in turn
        float *probs, *d_probs;      // A_t; dA_t and then dS_t
        float* ref_probs = nullptr;  // A_r, and then dS_r
        float *grad_key = nullptr, *grad_value = nullptr, *grad_reference = nullptr;
        size_t bytes;
    };

    // Rows of a tile as float32: in place, or converted and padded with zeros.
    Rows rows(const View& view, int64_t n, int64_t count, int64_t tile_rows, float* staging) const {
        // accumulate() reads a whole vector past the end of a row and ignores these columns. They
        // belong to the next head or row, which the last rows of a tensor do not have.
        const int64_t past_end = scratch_.width - call_.head_dim;
        if (call_.dtype == DType::float32 && call_.head_dim % 4 == 0 && count == tile_rows &&
            (past_end == 0 || (n + count < call_.queries && view.row >= past_end))) {
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
        Prefetcher prefetcher;
        const int64_t next = end - n - count < kRows ? end - n - count : kRows;
        prefetcher.add(call_.grad_output, call_.dtype, b_, h_, n, count, call_.head_dim);
        prefetcher.add(call_.grad_query, call_.dtype, b_, h_, n, count, call_.head_dim);
        prefetcher.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        Vec inv_sum[J], ref_inv_sum[J] = {}, delta[J] = {};
        const Rows key{scratch_.key, call_.head_dim};
        softmax_tile<J>(key, keys_.count, call_.head_dim, scratch_.columns, scale.sm_scale_log2,
                        scratch_.probs, inv_sum, prefetcher);
        if (call_.with_reference()) {
            softmax_tile<J>(reference_, keys_.count, call_.head_dim, scratch_.columns,
                            scale.sm_scale_log2, scratch_.ref_probs, ref_inv_sum, prefetcher);
        }
        Rows grad_output{nullptr, 0};
        if (call_.grad_output.data) {
            grad_output = rows(call_.grad_output, n, count, kRows, scratch_.output_rows);
            rows_to_columns<J>(grad_output.data, grad_output.stride, padded, 1.0f,
                               scratch_.columns);
        }
        if (call_.with_reference()) {
            probability_gradients<J, true>(n, count, inv_sum, ref_inv_sum, delta, prefetcher);
        } else {
            probability_gradients<J, false>(n, count, inv_sum, ref_inv_sum, delta, prefetcher);
        }
        softmax_backward<J>(scratch_.probs, scratch_.d_probs, delta);
        if (call_.reference_grad && call_.with_reference()) ref_softmax_backward<J>(ref_inv_sum);
        accumulate<J>(count, scratch_.d_probs, query, scratch_.grad_key);
        if (grad_output.data) {
            accumulate<J>(count, scratch_.probs, grad_output, scratch_.grad_value);
        }
        accumulate<J>(count, scratch_.ref_probs, query, scratch_.grad_reference);
        if (call_.grad_query.data) write_grad_query<J>(n, count, prefetcher);
    }

    // dA_t = dO V^T + loss_factor (A_t - A_r) + gradients of chosen columns; delta = rowsum(A_t
    // dA_t).
    template <int J, bool kReference>
    void probability_gradients(int64_t n, int64_t count, const Vec (&inv_sum)[J],
                               const Vec (&ref_inv_sum)[J], Vec (&delta)[J],
                               Prefetcher& prefetcher) {
        constexpr int64_t kRows = J * kLanes;
        const bool with_probs_grad = call_.probs_count && call_.grad_attn_probs;
        if (with_probs_grad) gather_probs_grads<J>(n, count);
        struct State {
            Vec delta[J], inv_sum[J], ref_inv_sum[J];
        } state = {};
        for (int j = 0; j < J; ++j) {
            state.inv_sum[j] = inv_sum[j];
            state.ref_inv_sum[j] = ref_inv_sum[j];
        }
        float *const probs_tile = scratch_.probs, *const ref_probs_tile = scratch_.ref_probs;
        float* const d_probs_tile = scratch_.d_probs;
        const float* const loss_factor = loss_factor_;
        const auto visit = [=](int64_t m, const Vec(&products)[J],
                               State& state) __attribute__((always_inline)) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = m * kRows + j * kLanes;
                const Vec p = load(probs_tile + at) * state.inv_sum[j];
                Vec d_probs = products[j];
                if constexpr (kReference) {
                    const Vec ref_probs = load(ref_probs_tile + at) * state.ref_inv_sum[j];
                    d_probs = fma(broadcast(loss_factor[m]), p - ref_probs, d_probs);
                }
                if (with_probs_grad) d_probs += load(d_probs_tile + at);
                state.delta[j] = fma(p, d_probs, state.delta[j]);
                store(probs_tile + at, p);
                store(d_probs_tile + at, d_probs);
            }
        };
        if (call_.grad_output.data) {
            product<J, Scalars::along_rows>(keys_.count, value_.data, value_.stride,
                                            scratch_.columns, kRows, call_.head_dim, state, visit,
                                            &prefetcher);
        } else {
            const Vec none[J] = {};
            for (int64_t m = 0; m < keys_.count; ++m) visit(m, none, state);
        }
        for (int j = 0; j < J; ++j) delta[j] = state.delta[j];
    }

    template <int J>
    void gather_probs_grads(int64_t n, int64_t count) {
        constexpr int64_t kRows = J * kLanes;
        __builtin_memset(scratch_.d_probs, 0, size_t(4 * keys_.count * kRows));
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t m = keys_.find_column(call_, b_, t);
            if (m < 0) continue;
            const float* from = call_.grad_attn_probs + probs_offset(call_, b_, h_, t) + n;
            float* to = scratch_.d_probs + m * kRows;
            for (int64_t i = 0; i < count; ++i) to[i] += share * from[i];
        }
    }

    // dS = A (dA - delta) in place of dA.
    template <int J>
    void softmax_backward(const float* probability, float* d_probs, const Vec (&delta)[J]) {
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = (m * J + j) * kLanes;
                store(d_probs + at, load(probability + at) * (load(d_probs + at) - delta[j]));
            }
        }
    }

    // dA_r = -loss_factor (A_t - A_r); dS_r replaces A_r.
    template <int J>
    void ref_softmax_backward(const Vec (&ref_inv_sum)[J]) {
        Vec delta[J] = {};
        const auto d_probs = [&](int64_t m, int64_t at, Vec ref_probs) {
            return loss_factor_[m] * (ref_probs - load(scratch_.probs + at));
        };
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = (m * J + j) * kLanes;
                const Vec ref_probs = load(scratch_.ref_probs + at) * ref_inv_sum[j];
                store(scratch_.ref_probs + at, ref_probs);
                delta[j] += ref_probs * d_probs(m, at, ref_probs);
            }
        }
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = (m * J + j) * kLanes;
                const Vec ref_probs = load(scratch_.ref_probs + at);
                store(scratch_.ref_probs + at, ref_probs * (d_probs(m, at, ref_probs) - delta[j]));
            }
        }
    }

    template <int J>
    void write_grad_query(int64_t n, int64_t count, Prefetcher& prefetcher) {
        constexpr int64_t kRows = J * kLanes;
        float* columns = scratch_.columns;
        const float scale = call_.scale;
        product<J, Scalars::along_columns>(
            call_.head_dim, scratch_.key, call_.head_dim, scratch_.d_probs, kRows, keys_.count,
            [=](int64_t d, const Vec(&sums)[J]) __attribute__((always_inline)) {
                for (int j = 0; j < J; ++j) {
                    store(columns + d * kRows + j * kLanes, scale * sums[j]);
                }
            },
            &prefetcher);
        if (call_.reference_grad && call_.with_reference()) {
            product<J, Scalars::along_columns>(
                call_.head_dim, scratch_.reference, call_.head_dim, scratch_.ref_probs, kRows,
                keys_.count, [=](int64_t d, const Vec(&sums)[J]) __attribute__((always_inline)) {
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
        // The rows of the query are not needed after grad_key.
        columns_to_rows<J>(columns, round_up(call_.head_dim, 4), scratch_.query_rows,
                           scratch_.width);
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

    const BackwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const Scratch scratch_;
    Rows value_{nullptr, 0}, reference_{nullptr, 0};
    float loss_factor_[kMaxKeys];
};

}  // namespace SEFI_ISA
}  // namespace sefi
