// Parameters of the kernels: the call, its split into thread blocks, and the scratch memory.
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "problem.h"

namespace sefi::cuda {

// Block (x, y) takes head x % heads of sample x / heads and the query rows
// [y * rows_per_cta, (y + 1) * rows_per_cta).
struct SplitPlan {
    int64_t rows_per_cta = 0, num_splits = 0;

    // 32 bits hold every row index of the calls that the mma kernels support.
    SEFI_DEVICE int begin() const { return int(blockIdx.y * rows_per_cta); }
    SEFI_DEVICE int end(const Problem& p) const {
        return int(min((blockIdx.y + int64_t(1)) * rows_per_cta, p.queries));
    }
};

struct FwdParams {
    ForwardCall call;
    SplitPlan split;
    float sm_scale_log2 = 0.0f, scale_sign = 1.0f;  // |scale| * log2(e), sign of the scale
    float* partials = nullptr;    // subject loss, [batch, heads, num_splits]; null without one
    float* attn_probs = nullptr;  // [batch, heads, probs_count, queries]; null without positions
};

// Float32 numbers of each query row, [batch, heads, kRowStats, padded_rows]. A probability is
// exp2(sm_scale_log2 * (score - row_max)) * inv_sum in the simt kernels and
// exp2(sm_scale_log2 * score - lse) in the mma kernels.
enum RowStat : int {
    // Statistics of A_t.
    kRowMax = 0,
    kLse = 0,
    kInvSum = 1,
    kDelta = 2,  // rowsum(A_t dA_t)
    // Statistics of A_r in the same order.
    kRefStats = 3,
    kRowStats = 6,
};

struct BwdParams {
    BackwardCall call;
    SplitPlan split;
    float sm_scale_log2 = 0.0f, scale_sign = 1.0f;
    bool with_reference = false;  // the subject loss has a gradient
    bool reference_grad = false;  // this gradient also reaches A_r
    float* row_stats = nullptr;
    int64_t padded_rows = 0;
    float probs_grad_share = 1.0f;  // share of a head in the gradient of averaged probabilities
    // Partial sums of dK_t, dV_t and dK_r, [batch, heads, num_splits, keys, head_dim]. Null for a
    // gradient that is not wanted, or that the kernel writes itself because nothing is summed.
    float *key = nullptr, *value = nullptr, *reference = nullptr;
};

// Partial sums of one gradient and the tensor of their sum.
struct SplitGradient {
    const float* partials = nullptr;
    View result;
};

struct ReduceSplitsParams {
    SplitGradient gradients[3];
    int64_t batch = 0, heads = 0, num_splits = 0, keys = 0, head_dim = 0;
    int threads_per_sum = 1;  // a power of two
    DType dtype = DType::float32;
};

struct ReduceLossParams {
    const float* partials = nullptr;
    float* subject_loss = nullptr;
    int64_t batch = 0, heads = 0, num_splits = 0;
};

struct AverageHeadsParams {
    const float* all = nullptr;      // [batch, heads, entries]
    float* mean = nullptr;           // [batch, entries]
    int64_t heads = 0, entries = 0;  // entries = probs_count * queries
    int64_t count = 0;               // batch * entries
};

template <class E>
SEFI_DEVICE E* head_of(const View& view, int64_t b, int64_t h) {
    return reinterpret_cast<E*>(view.data) + b * view.batch + h * view.head;
}

}  // namespace sefi::cuda
