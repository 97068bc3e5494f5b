// What the kernels get: the call, where its partial results go, and how its rows are cut.
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "problem.h"

namespace sefi::cuda {

// Both directions: block (x, y) works on head x % heads of sample x / heads, rows
// [y * rows_a_block, (y + 1) * rows_a_block).
struct Cut {
    int64_t rows_a_block = 0, splits = 0;
    // |scale| * log2(e), and the scale's sign: softmax seeks the maximum of sign * q k.
    float scale_log2 = 0.0f, sign = 1.0f;

    // A block's rows, where 32 bits count them all.
    SEFI_DEVICE int begin() const { return int(blockIdx.y * rows_a_block); }
    SEFI_DEVICE int end(const Problem& p) const {
        return int(min((blockIdx.y + int64_t(1)) * rows_a_block, p.queries));
    }
};

struct ForwardArguments {
    ForwardCall call;
    Cut cut;
    float* partials = nullptr;  // subject loss of [batch, heads, splits], or null
    float* attn_probs = nullptr;      // [batch, heads, probs_count, queries], or null
};

// Float32 numbers that every query row has, [batch, heads, kStatistics, padded_rows]. A probability
// is exp2(scale_log2 * (score - peak)) * inverse or exp2(scale_log2 * score - log_sum); a kernel of
// the queries and the kernel of the keys that follows it agree on one of the two.
enum Statistic : int {
    // Of A_t's row; the mean is rowsum(A_t dA_t).
    kPeak = 0,
    kLogSum = 0,
    kInverse = 1,
    kMean = 2,
    // Of A_r's row.
    kAnchor = 3,
    kStatistics = 6,
};

struct BackwardArguments {
    BackwardCall call;
    Cut cut;
    bool with_reference = false;  // the subject loss's gradient came
    bool reference_grad = false;  // and runs through A_r too
    float* statistics = nullptr;
    int64_t padded_rows = 0;
    float map_share = 1.0f;  // of a map's gradient that each head gets
    // Partial sums of dK_t, dV_t, dK_r, [batch, heads, splits, keys, head_dim]. Null where a
    // gradient is not wanted, or where nothing is to be added up: then it is written itself.
    float *key = nullptr, *value = nullptr, *reference = nullptr;
};

// One gradient's partial sums and where their total goes: for every sample, or one for all.
struct Total {
    const float* partials = nullptr;
    View result;
};

struct TotalArguments {
    Total totals[3];
    int64_t batch = 0, heads = 0, splits = 0, keys = 0, head_dim = 0;
    int parts = 1;  // threads that share a number, a power of two
    DType dtype = DType::float32;
};

struct SubjectLossArguments {
    const float* partials = nullptr;
    float* subject_loss = nullptr;
    int64_t batch = 0, heads = 0, splits = 0;
};

struct MapArguments {
    const float* all = nullptr;  // [batch, heads, entries]
    float* mean = nullptr;       // [batch, entries]
    int64_t heads = 0, entries = 0;  // entries = probs_count * queries
    int64_t count = 0;               // of all means
};

template <class E>
SEFI_DEVICE E* head_of(const View& view, int64_t b, int64_t h) {
    return reinterpret_cast<E*>(view.data) + b * view.batch + h * view.head;
}

}  // namespace sefi::cuda
