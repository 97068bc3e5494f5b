// Backward kernels for any size, layout and dtype: equations 7 to 11 of docs/method.md.
#include "cuda/attn_simt.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sefi::cuda::simt {
namespace {

// A thread of the dK/dV kernel has one key and every kKeyThreads-th of its columns.
constexpr int kKeys = 16, kKeyThreads = kThreads / kKeys;
constexpr int kColumns = int(kMaxHeadDim) / kKeyThreads;

// 2 g w / H: the factor of A_t - A_r in the gradient of the subject loss.
struct LossFactor {
    float factor;
    const float* weights;

    SEFI_DEVICE LossFactor(const BwdParams& a, int64_t b)
        : factor(a.with_reference ? 2.0f * a.call.grad_subject_loss[b] / float(a.call.heads)
                                  : 0.0f),
          weights(a.call.token_weights ? a.call.token_weights + b * a.call.token_weights_batch
                                       : nullptr) {}
    SEFI_DEVICE float operator()(int key) const { return weights ? factor * weights[key] : factor; }
};

size_t dq_shared_bytes(const BackwardCall& p) {
    const size_t row = size_t(p.head_dim | 1), keys = size_t(p.keys | 1);
    return 4 * (kRows * (row + (p.with_reference() ? 3 : 2) * keys) + kKeyTile);
}

template <class E>
__global__ void __launch_bounds__(kThreads) attn_bwd_dq_kernel(const BwdParams a) {
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int keys = int(call.keys), head_dim = int(call.head_dim), stride = padded(keys);
    const bool with_reference = a.with_reference;
    float* const rows = reinterpret_cast<float*>(shared_memory());
    float* const probs = rows + kRows * padded(head_dim);
    float* const d_probs = probs + kRows * stride;
    float* const ref_probs = d_probs + kRows * stride;
    float* const key_tile = with_reference ? ref_probs + kRows * stride : ref_probs;
    const Rows<E> query(call.query, b, h), key(call.key, b, h), value(call.value, b, h),
        reference(call.reference_key, b, h), grad_output(call.grad_output, b, h);
    E* const grad_query = head_of<E>(call.grad_query, b, h);
    const Visible visible(call, b);
    const LossFactor loss_factor(a, b);
    float* const row_stats = a.row_stats + blockIdx.x * kRowStats * a.padded_rows;

    const int row = threadIdx.x / kRowThreads, lane = threadIdx.x % kRowThreads;
    const int64_t begin = blockIdx.y * a.split.rows_per_cta;
    const int64_t end = min(begin + a.split.rows_per_cta, call.queries);
    for (int64_t first = begin; first < end; first += kRows) {
        const bool inside = first + row < end;
        const auto store_stat = [&](int which, float number) {
            if (lane == 0 && inside) row_stats[which * a.padded_rows + first + row] = number;
        };
        float* const p = probs + row * stride;
        float* const dp = d_probs + row * stride;
        float* const ref = ref_probs + row * stride;
        __syncthreads();
        load_tile<kRows>(query, first, end, head_dim, rows);
        multiply_keys(rows, key, keys, head_dim, visible, key_tile, probs);
        const RowStats stats = softmax(p, keys, lane, visible, a);
        store_stat(kRowMax, stats.row_max);
        store_stat(kInvSum, stats.inv_sum);
        if (with_reference) {
            multiply_keys(rows, reference, keys, head_dim, visible, key_tile, ref_probs);
            const RowStats ref_stats = softmax(ref, keys, lane, visible, a);
            store_stat(kRefStats + kRowMax, ref_stats.row_max);
            store_stat(kRefStats + kInvSum, ref_stats.inv_sum);
        }
        if (call.grad_output.data) {
            __syncthreads();
            load_tile<kRows>(grad_output, first, end, head_dim, rows);
            multiply_keys(rows, value, keys, head_dim, visible, key_tile, d_probs);
        } else {
            for (int k = lane; k < keys; k += kRowThreads) dp[k] = 0.0f;
        }
        if (call.grad_attn_probs && call.probs_count) {
            __syncwarp();
            const int64_t* positions = call.probs_positions + b * call.probs_positions_batch;
            const int64_t probs_head = call.probs_all_heads ? int64_t(blockIdx.x) : b;
            for (int64_t t = 0; lane == 0 && inside && t < call.probs_count; ++t) {
                if (positions[t] < 0 || positions[t] >= keys) continue;
                const int64_t at = (probs_head * call.probs_count + t) * call.queries + first + row;
                dp[positions[t]] += a.probs_grad_share * call.grad_attn_probs[at];
            }
            __syncwarp();
        }
        float delta = 0.0f, ref_delta = 0.0f;
        for (int k = lane; k < keys; k += kRowThreads) {
            if (with_reference) {
                const float d_probs_loss = loss_factor(k) * (p[k] - ref[k]);
                dp[k] += d_probs_loss;
                ref_delta = fmaf(ref[k], -d_probs_loss, ref_delta);
            }
            delta = fmaf(p[k], dp[k], delta);
        }
        delta = row_sum(delta);
        store_stat(kDelta, delta);
        if (with_reference) {
            ref_delta = row_sum(ref_delta);
            store_stat(kRefStats + kDelta, ref_delta);
        }
        for (int k = lane; k < keys; k += kRowThreads) {
            const float d_probs_loss = with_reference ? loss_factor(k) * (p[k] - ref[k]) : 0.0f;
            dp[k] = p[k] * (dp[k] - delta);
            if (with_reference) ref[k] *= -d_probs_loss - ref_delta;
        }
        if (!call.grad_query.data) continue;
        weighted_sums(d_probs, key, a.reference_grad ? ref_probs : nullptr, reference, keys,
                      head_dim, visible, key_tile, [&](int r, int column, float sum) {
                          if (first + r >= end) return;
                          store_float(call.scale * sum,
                                      grad_query[(first + r) * call.grad_query.row + column]);
                      });
    }
}

size_t dkdv_shared_bytes(const BackwardCall& p) {
    return 4 * ((3 * kKeys + 2 * kRows) * size_t(p.head_dim | 1) + 3 * kRows * kKeys);
}

// sums[column] += sum over the rows of weights[row] * rows[row][column] for one key.
SEFI_DEVICE void add_rows(const float* weights, const float* rows, int head_dim,
                          float (&sums)[kColumns]) {
    float part[kColumns] = {};
    for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kKeys];
        const float* row = rows + r * padded(head_dim) + threadIdx.x % kKeyThreads;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (i * kKeyThreads + int(threadIdx.x % kKeyThreads) < head_dim) {
                part[i] = fmaf(weight, row[i * kKeyThreads], part[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += part[i];
}

// Block z takes the keys [kKeys * z, kKeys * (z + 1)).
template <class E>
__global__ void __launch_bounds__(kThreads) attn_bwd_dkdv_kernel(const BwdParams a) {
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int keys = int(call.keys), head_dim = int(call.head_dim), stride = padded(head_dim);
    const int first_key = int(blockIdx.z) * kKeys;
    const bool with_reference = a.with_reference && (a.key || a.reference);
    const bool with_probs_grad = a.key && call.grad_attn_probs && call.probs_count;
    float* const key = reinterpret_cast<float*>(shared_memory());
    float* const value = key + kKeys * stride;
    float* const reference = value + kKeys * stride;
    float* const rows = reference + kKeys * stride;
    float* const grad_rows = rows + kRows * stride;
    float* const probs = grad_rows + kRows * stride;  // [row][key]: A_t, dS_t and dS_r
    float* const d_probs = probs + kRows * kKeys;
    float* const ref_probs = d_probs + kRows * kKeys;
    const Rows<E> query(call.query, b, h), grad_output(call.grad_output, b, h);
    const Visible visible(call, b);
    const LossFactor loss_factor(a, b);
    const float* const row_stats = a.row_stats + blockIdx.x * kRowStats * a.padded_rows;
    const int64_t* positions = call.probs_positions + b * call.probs_positions_batch;
    const int64_t probs_head = call.probs_all_heads ? int64_t(blockIdx.x) : b;

    load_tile<kKeys>(Rows<E>(call.key, b, h), first_key, keys, head_dim, key);
    if (call.grad_output.data) {
        load_tile<kKeys>(Rows<E>(call.value, b, h), first_key, keys, head_dim, value);
    }
    if (with_reference) {
        load_tile<kKeys>(Rows<E>(call.reference_key, b, h), first_key, keys, head_dim, reference);
    }
    float key_sums[kColumns] = {}, value_sums[kColumns] = {}, reference_sums[kColumns] = {};
    const int64_t begin = blockIdx.y * a.split.rows_per_cta;
    const int64_t end = min(begin + a.split.rows_per_cta, call.queries);
    for (int64_t first = begin; first < end; first += kRows) {
        __syncthreads();
        load_tile<kRows>(query, first, end, head_dim, rows);
        if (call.grad_output.data) load_tile<kRows>(grad_output, first, end, head_dim, grad_rows);
        __syncthreads();
        for (int place = threadIdx.x; place < kRows * kKeys; place += kThreads) {
            const int r = place / kKeys, k = place % kKeys;
            const int64_t row = first + r;
            float p = 0.0f, dp = 0.0f, ref = 0.0f;
            if (row < end && first_key + k < keys && visible(first_key + k)) {
                const float *q = rows + r * stride, *g = grad_rows + r * stride;
                const auto product = [&](const float* left, const float* right) {
                    float sum = 0.0f;
                    for (int c = 0; c < head_dim; ++c)
                        sum = fmaf(left[c], right[k * stride + c], sum);
                    return sum;
                };
                const auto probability = [&](const float* right, int which) {
                    const float* own = row_stats + which * a.padded_rows + row;
                    const float score = a.scale_sign * product(q, right) - own[0];
                    return mul_rn(exp2f(score * a.sm_scale_log2), own[a.padded_rows]);
                };
                p = probability(key, 0);
                if (a.key && call.grad_output.data) dp = product(g, value);
                if (with_reference) {
                    ref = probability(reference, kRefStats);
                    const float d_probs_loss = loss_factor(first_key + k) * (p - ref);
                    dp += d_probs_loss;
                    ref *= -d_probs_loss - row_stats[(kRefStats + kDelta) * a.padded_rows + row];
                }
                for (int64_t t = 0; with_probs_grad && t < call.probs_count; ++t) {
                    if (positions[t] != first_key + k) continue;
                    const int64_t at = (probs_head * call.probs_count + t) * call.queries + row;
                    dp += a.probs_grad_share * call.grad_attn_probs[at];
                }
                dp = p * (dp - row_stats[kDelta * a.padded_rows + row]);
            }
            probs[place] = p;
            d_probs[place] = dp;
            ref_probs[place] = ref;
        }
        __syncthreads();
        const int k = int(threadIdx.x) / kKeyThreads;
        if (a.key) add_rows(d_probs + k, rows, head_dim, key_sums);
        if (a.value) add_rows(probs + k, grad_rows, head_dim, value_sums);
        if (a.reference) add_rows(ref_probs + k, rows, head_dim, reference_sums);
    }
    const int k = first_key + int(threadIdx.x) / kKeyThreads;
    const int64_t entry = blockIdx.x * a.split.num_splits + blockIdx.y;
    const auto store = [&](float* partials, const float (&sums)[kColumns], float factor) {
        if (!partials || k >= keys) return;
        float* to = partials + (entry * keys + k) * head_dim;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = i * kKeyThreads + int(threadIdx.x % kKeyThreads);
            if (column < head_dim) to[column] = factor * sums[i];
        }
    };
    store(a.key, key_sums, call.scale);
    store(a.value, value_sums, 1.0f);
    store(a.reference, reference_sums, call.scale);
}

}  // namespace

cudaError_t attn_bwd_dq(const BwdParams& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits));
    return for_dtype(a.call.dtype, [&](auto element) {
        return launch(attn_bwd_dq_kernel<decltype(element)>, grid, kThreads,
                      dq_shared_bytes(a.call), stream, a);
    });
}

cudaError_t attn_bwd_dkdv(const BwdParams& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits),
                    unsigned((a.call.keys + kKeys - 1) / kKeys));
    return for_dtype(a.call.dtype, [&](auto element) {
        return launch(attn_bwd_dkdv_kernel<decltype(element)>, grid, kThreads,
                      dkdv_shared_bytes(a.call), stream, a);
    });
}

}  // namespace sefi::cuda::simt
