// Forward of one head for a range of query rows: output, subject loss and chosen columns.
#pragma once

#include "cpu/softmax.h"

namespace sefi {
namespace SEFI_ISA {

class ForwardUnit {
public:
    ForwardUnit(const ForwardCall& call, int64_t b, int64_t h, char* memory)
        : call_(call), b_(b), h_(h), keys_(call, b), scratch_(call, memory) {
        key_ = key_rows(call.key, call.dtype, b, h, keys_, call, scratch_.key);
        pack_keys(call.value, call.dtype, b, h, keys_, call.head_dim, scratch_.value);
        if (!call.reference_key.data) return;
        reference_ =
            key_rows(call.reference_key, call.dtype, b, h, keys_, call, scratch_.reference);
        load_token_weights(call, b, keys_, 1.0f, weights_);
    }

    double run(int64_t begin, int64_t end) {
        if (keys_.count == 0) {
            zero_outputs(call_, b_, h_, begin, end);
            return 0.0;
        }
        double subject_loss = 0.0;
        for (int64_t n = begin; n < end;) {
            // Narrow tiles only for a rest for which they are cheaper than a wide one.
            if (end - n > kTileVectors / 2 * kLanes) {
                subject_loss += tile<kTileVectors>(n, end);
                n += kTileVectors * kLanes;
            } else {
                subject_loss += tile<1>(n, end);
                n += kLanes;
            }
        }
        return subject_loss;
    }

    static size_t scratch_bytes(const Problem& problem) { return Scratch(problem, nullptr).bytes; }

private:
    struct Scratch {
        Scratch(const Problem& p, char* memory) {
            Arena arena(memory);
            width = round_up(p.head_dim, kLanes);
            key = arena.floats(packed_floats(p));
            value = arena.floats(packed_floats(p));
            rows = arena.floats(kMaxTileRows * width);
            columns = arena.floats(kMaxTileRows * width);
            probs = arena.floats(p.keys * kMaxTileRows);
            if (p.reference_key.data) {
                reference = arena.floats(packed_floats(p));
                ref_probs = arena.floats(p.keys * kMaxTileRows);
            }
            bytes = arena.used();
        }
        int64_t width;
        float *key, *value, *rows, *columns, *probs;       // probs: A_t before division
        float *reference = nullptr, *ref_probs = nullptr;  // ref_probs: A_r before division
        size_t bytes;
    };

    // Whether a tile is read and written in place: a whole one in float32.
    bool in_place(int64_t count, int64_t tile_rows) const {
        return count == tile_rows && call_.dtype == DType::float32 && call_.head_dim % 4 == 0;
    }

    template <int J>
    double tile(int64_t n, int64_t end) {
        constexpr int64_t kRows = J * kLanes;
        const int64_t count = end - n < kRows ? end - n : kRows;
        const ScoreScale scale(call_.scale);
        if (in_place(count, kRows)) {
            const char* rows = call_.query.at(call_.dtype, b_, h_, n);
            rows_to_columns<J>(reinterpret_cast<const float*>(rows), call_.query.row,
                               call_.head_dim, scale.sign, scratch_.columns);
        } else {
            load_rows(call_.query, call_.dtype, b_, h_, n, count, kRows, call_.head_dim,
                      scratch_.width, scratch_.rows);
            rows_to_columns<J>(scratch_.rows, scratch_.width, round_up(call_.head_dim, 4),
                               scale.sign, scratch_.columns);
        }
        Prefetcher prefetcher;
        const int64_t next = end - n - count < kRows ? end - n - count : kRows;
        prefetcher.add(call_.output, call_.dtype, b_, h_, n, count, call_.head_dim);
        prefetcher.add(call_.query, call_.dtype, b_, h_, n + count, next, call_.head_dim);
        Vec inv_sum[J];
        softmax_tile<J>(key_, keys_.count, call_.head_dim, scratch_.columns, scale.sm_scale_log2,
                        scratch_.probs, inv_sum, prefetcher);
        const double subject_loss =
            call_.reference_key.data ? tile_loss<J>(count, inv_sum, prefetcher) : 0.0;
        if (call_.probs_count) write_probs<J>(n, count, inv_sum);
        write_output<J>(n, count, inv_sum, prefetcher);
        return subject_loss;
    }

    template <int J>
    double tile_loss(int64_t count, const Vec (&inv_sum)[J], Prefetcher& prefetcher) {
        constexpr int64_t kRows = J * kLanes;
        Vec ref_inv_sum[J];
        softmax_tile<J>(reference_, keys_.count, call_.head_dim, scratch_.columns,
                        ScoreScale(call_.scale).sm_scale_log2, scratch_.ref_probs, ref_inv_sum,
                        prefetcher);
        Vec total[J] = {};
        for (int64_t m = 0; m < keys_.count; ++m) {
            for (int j = 0; j < J; ++j) {
                const int64_t at = m * kRows + j * kLanes;
                const Vec probs = load(scratch_.probs + at) * inv_sum[j];
                const Vec difference = probs - load(scratch_.ref_probs + at) * ref_inv_sum[j];
                total[j] = fma(weights_[m] * difference, difference, total[j]);
            }
        }
        double subject_loss = 0.0;
        // Lanes past the rows are not added, because an infinite key turns their zeros into NaN.
        float rows[kRows];
        for (int j = 0; j < J; ++j) store(rows + j * kLanes, total[j]);
        for (int64_t i = count; i < kRows; ++i) rows[i] = 0.0f;
        for (int j = 0; j < J; ++j) subject_loss += double(sum(load(rows + j * kLanes)));
        return subject_loss;
    }

    template <int J>
    void write_probs(int64_t n, int64_t count, const Vec (&inv_sum)[J]) {
        const float share = call_.probs_all_heads ? 1.0f : 1.0f / float(call_.heads);
        for (int64_t t = 0; t < call_.probs_count; ++t) {
            const int64_t m = keys_.find_column(call_, b_, t);
            float column[J * kLanes] = {};
            for (int j = 0; m >= 0 && j < J; ++j) {
                const float* p = scratch_.probs + (m * J + j) * kLanes;
                store(column + j * kLanes, share * (load(p) * inv_sum[j]));
            }
            float* to = call_.attn_probs + probs_offset(call_, b_, h_, t) + n;
            const bool add = !call_.probs_all_heads && h_ > 0;
            for (int64_t i = 0; i < count; ++i) to[i] = add ? to[i] + column[i] : column[i];
        }
    }

    template <int J>
    void write_output(int64_t n, int64_t count, const Vec (&inv_sum)[J], Prefetcher& prefetcher) {
        constexpr int64_t kRows = J * kLanes;
        // The columns of the query are not needed any more.
        float* columns = scratch_.columns;
        product<J, Scalars::along_columns>(
            call_.head_dim, scratch_.value, call_.head_dim, scratch_.probs, kRows, keys_.count,
            [&](int64_t d, const Vec(&sums)[J]) __attribute__((always_inline)) {
                for (int j = 0; j < J; ++j) {
                    store(columns + d * kRows + j * kLanes, sums[j] * inv_sum[j]);
                }
            },
            &prefetcher);
        if (in_place(count, kRows)) {
            char* rows = call_.output.at(call_.dtype, b_, h_, n);
            columns_to_rows<J>(columns, call_.head_dim, reinterpret_cast<float*>(rows),
                               call_.output.row);
            return;
        }
        columns_to_rows<J>(columns, round_up(call_.head_dim, 4), scratch_.rows, scratch_.width);
        for (int64_t i = 0; i < count; ++i) {
            store_row(scratch_.rows + i * scratch_.width, call_.head_dim, 1.0f,
                      call_.output.at(call_.dtype, b_, h_, n + i), call_.dtype);
        }
    }

    const ForwardCall& call_;
    const int64_t b_, h_;
    const KeyList keys_;
    const Scratch scratch_;
    Rows key_{nullptr, 0}, reference_{nullptr, 0};
    float weights_[kMaxKeys];
};

}  // namespace SEFI_ISA
}  // namespace sefi
