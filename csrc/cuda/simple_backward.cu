// Backward kernels for any size, layout and dtype: equations 7 to 11 of docs/method.md.
#include "cuda/kernels.h"
#include "cuda/simple.h"
#include "cuda/start.h"

namespace sefi::cuda::simple {
namespace {

constexpr int kKeys = 16, kMaxWidth = 256;
// A thread of the keys' kernel has one key and every kKeyThreads-th column of it.
constexpr int kKeyThreads = kThreads / kKeys, kColumns = kMaxWidth / kKeyThreads;

// 2 g w / H, what a subject loss's gradient makes of A_t - A_r.
struct Pull {
    float factor;
    const float* weights;

    SEFI_DEVICE Pull(const BackwardArguments& a, int64_t b)
        : factor(a.with_reference ? 2.0f * a.call.grad_subject_loss[b] / float(a.call.heads) : 0.0f),
          weights(a.call.token_weights
                      ? a.call.token_weights + b * a.call.token_weights_batch
                      : nullptr) {}
    SEFI_DEVICE float operator()(int key) const {
        return weights ? factor * weights[key] : factor;
    }
};

size_t query_bytes(const BackwardCall& p) {
    const size_t row = size_t(p.head_dim | 1), keys = size_t(p.keys | 1);
    return 4 * (kRows * (row + (p.with_reference() ? 3 : 2) * keys) + kPiece);
}

template <class E>
__global__ void __launch_bounds__(kThreads) query_kernel(const BackwardArguments a) {
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int keys = int(call.keys), width = int(call.head_dim), stride = padded(keys);
    const bool with_reference = a.with_reference;
    float* const rows = reinterpret_cast<float*>(shared_memory());
    float* const target = rows + kRows * padded(width);
    float* const slope = target + kRows * stride;
    float* const anchor = slope + kRows * stride;
    float* const piece = with_reference ? anchor + kRows * stride : anchor;
    const Rows<E> query(call.query, b, h), key(call.key, b, h), value(call.value, b, h),
        reference(call.reference_key, b, h), grad_output(call.grad_output, b, h);
    E* const grad_query = head_of<E>(call.grad_query, b, h);
    const Visible visible(call, b);
    const Pull pull(a, b);
    float* const statistics = a.statistics + blockIdx.x * kStatistics * a.padded_rows;

    const int row = threadIdx.x / kRowThreads, mine = threadIdx.x % kRowThreads;
    const int64_t begin = blockIdx.y * a.cut.rows_a_block;
    const int64_t end = min(begin + a.cut.rows_a_block, call.queries);
    for (int64_t first = begin; first < end; first += kRows) {
        const bool inside = first + row < end;
        const auto keep = [&](int which, float number) {
            if (mine == 0 && inside) statistics[which * a.padded_rows + first + row] = number;
        };
        float* const p = target + row * stride;
        float* const s = slope + row * stride;
        float* const other = anchor + row * stride;
        __syncthreads();
        stage<kRows>(query, first, end, width, rows);
        inner_products(rows, key, keys, width, visible, piece, target);
        const Peak peak = softmax(p, keys, mine, visible, a.cut);
        keep(kPeak, peak.peak);
        keep(kInverse, peak.inverse);
        if (with_reference) {
            inner_products(rows, reference, keys, width, visible, piece, anchor);
            const Peak other_peak = softmax(other, keys, mine, visible, a.cut);
            keep(kAnchor + kPeak, other_peak.peak);
            keep(kAnchor + kInverse, other_peak.inverse);
        }
        if (call.grad_output.data) {
            __syncthreads();
            stage<kRows>(grad_output, first, end, width, rows);
            inner_products(rows, value, keys, width, visible, piece, slope);
        } else {
            for (int k = mine; k < keys; k += kRowThreads) s[k] = 0.0f;
        }
        if (call.grad_attn_probs && call.probs_count) {
            __syncwarp();
            const int64_t* tokens = call.probs_positions + b * call.probs_positions_batch;
            const int64_t map = call.probs_all_heads ? int64_t(blockIdx.x) : b;
            for (int64_t t = 0; mine == 0 && inside && t < call.probs_count; ++t) {
                if (tokens[t] < 0 || tokens[t] >= keys) continue;
                const int64_t at = (map * call.probs_count + t) * call.queries + first + row;
                s[tokens[t]] += a.map_share * call.grad_attn_probs[at];
            }
            __syncwarp();
        }
        float mean = 0.0f, other_mean = 0.0f;
        for (int k = mine; k < keys; k += kRowThreads) {
            if (with_reference) {
                const float toward = pull(k) * (p[k] - other[k]);
                s[k] += toward;
                other_mean = fmaf(other[k], -toward, other_mean);
            }
            mean = fmaf(p[k], s[k], mean);
        }
        mean = row_sum(mean);
        keep(kMean, mean);
        if (with_reference) {
            other_mean = row_sum(other_mean);
            keep(kAnchor + kMean, other_mean);
        }
        for (int k = mine; k < keys; k += kRowThreads) {
            const float toward = with_reference ? pull(k) * (p[k] - other[k]) : 0.0f;
            s[k] = p[k] * (s[k] - mean);
            if (with_reference) other[k] *= -toward - other_mean;
        }
        if (!call.grad_query.data) continue;
        weighted_sums(slope, key, a.reference_grad ? anchor : nullptr,
                      reference, keys, width, visible, piece,
                      [&](int r, int column, float sum) {
                          if (first + r >= end) return;
                          narrow(call.scale * sum,
                                 grad_query[(first + r) * call.grad_query.row + column]);
                      });
    }
}

size_t key_value_bytes(const BackwardCall& p) {
    return 4 * ((3 * kKeys + 2 * kRows) * size_t(p.head_dim | 1) + 3 * kRows * kKeys);
}

// sums[column] += sum over the rows of weights[row] * rows[row][column], for one key.
SEFI_DEVICE void add_rows(const float* weights, const float* rows, int width,
                          float (&sums)[kColumns]) {
    float part[kColumns] = {};
    for (int r = 0; r < kRows; ++r) {
        const float weight = weights[r * kKeys];
        const float* row = rows + r * padded(width) + threadIdx.x % kKeyThreads;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            if (i * kKeyThreads + int(threadIdx.x % kKeyThreads) < width) {
                part[i] = fmaf(weight, row[i * kKeyThreads], part[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sums[i] += part[i];
}

// Block z has the keys [kKeys * z, kKeys * (z + 1)).
template <class E>
__global__ void __launch_bounds__(kThreads) key_value_kernel(const BackwardArguments a) {
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int keys = int(call.keys), width = int(call.head_dim), stride = padded(width);
    const int first_key = int(blockIdx.z) * kKeys;
    const bool with_reference = a.with_reference && (a.key || a.reference);
    const bool with_maps = a.key && call.grad_attn_probs && call.probs_count;
    float* const key = reinterpret_cast<float*>(shared_memory());
    float* const value = key + kKeys * stride;
    float* const reference = value + kKeys * stride;
    float* const rows = reference + kKeys * stride;
    float* const grad_rows = rows + kRows * stride;
    float* const target = grad_rows + kRows * stride;  // [row][key]: A_t, dS_t and dS_r
    float* const slope = target + kRows * kKeys;
    float* const anchor = slope + kRows * kKeys;
    const Rows<E> query(call.query, b, h), grad_output(call.grad_output, b, h);
    const Visible visible(call, b);
    const Pull pull(a, b);
    const float* const statistics = a.statistics + blockIdx.x * kStatistics * a.padded_rows;
    const int64_t* tokens = call.probs_positions + b * call.probs_positions_batch;
    const int64_t map = call.probs_all_heads ? int64_t(blockIdx.x) : b;

    stage<kKeys>(Rows<E>(call.key, b, h), first_key, keys, width, key);
    if (call.grad_output.data) {
        stage<kKeys>(Rows<E>(call.value, b, h), first_key, keys, width, value);
    }
    if (with_reference) {
        stage<kKeys>(Rows<E>(call.reference_key, b, h), first_key, keys, width, reference);
    }
    float key_sums[kColumns] = {}, value_sums[kColumns] = {}, reference_sums[kColumns] = {};
    const int64_t begin = blockIdx.y * a.cut.rows_a_block;
    const int64_t end = min(begin + a.cut.rows_a_block, call.queries);
    for (int64_t first = begin; first < end; first += kRows) {
        __syncthreads();
        stage<kRows>(query, first, end, width, rows);
        if (call.grad_output.data) stage<kRows>(grad_output, first, end, width, grad_rows);
        __syncthreads();
        for (int place = threadIdx.x; place < kRows * kKeys; place += kThreads) {
            const int r = place / kKeys, k = place % kKeys;
            const int64_t row = first + r;
            float p = 0.0f, s = 0.0f, other = 0.0f;
            if (row < end && first_key + k < keys && visible(first_key + k)) {
                const float *q = rows + r * stride, *g = grad_rows + r * stride;
                const auto product = [&](const float* left, const float* right) {
                    float sum = 0.0f;
                    for (int c = 0; c < width; ++c) sum = fmaf(left[c], right[k * stride + c], sum);
                    return sum;
                };
                const auto probability = [&](const float* right, int which) {
                    const float* own = statistics + which * a.padded_rows + row;
                    const float score = a.cut.sign * product(q, right) - own[0];
                    return multiply(exp2f(score * a.cut.scale_log2), own[a.padded_rows]);
                };
                p = probability(key, 0);
                if (a.key && call.grad_output.data) s = product(g, value);
                if (with_reference) {
                    other = probability(reference, kAnchor);
                    const float toward = pull(first_key + k) * (p - other);
                    s += toward;
                    other *= -toward - statistics[(kAnchor + kMean) * a.padded_rows + row];
                }
                for (int64_t t = 0; with_maps && t < call.probs_count; ++t) {
                    if (tokens[t] != first_key + k) continue;
                    const int64_t at = (map * call.probs_count + t) * call.queries + row;
                    s += a.map_share * call.grad_attn_probs[at];
                }
                s = p * (s - statistics[kMean * a.padded_rows + row]);
            }
            target[place] = p;
            slope[place] = s;
            anchor[place] = other;
        }
        __syncthreads();
        const int k = int(threadIdx.x) / kKeyThreads;
        if (a.key) add_rows(slope + k, rows, width, key_sums);
        if (a.value) add_rows(target + k, grad_rows, width, value_sums);
        if (a.reference) add_rows(anchor + k, rows, width, reference_sums);
    }
    const int k = first_key + int(threadIdx.x) / kKeyThreads;
    const int64_t entry = blockIdx.x * a.cut.splits + blockIdx.y;
    const auto store = [&](float* partials, const float(&sums)[kColumns], float factor) {
        if (!partials || k >= keys) return;
        float* to = partials + (entry * keys + k) * width;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = i * kKeyThreads + int(threadIdx.x % kKeyThreads);
            if (column < width) to[column] = factor * sums[i];
        }
    };
    store(a.key, key_sums, call.scale);
    store(a.value, value_sums, 1.0f);
    store(a.reference, reference_sums, call.scale);
}

template <class E>
cudaError_t run_query(const BackwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(query_kernel<E>, grid, kThreads, query_bytes(a.call), stream, a);
}

template <class E>
cudaError_t run_key_value(const BackwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits),
                    unsigned((a.call.keys + kKeys - 1) / kKeys));
    return start(key_value_kernel<E>, grid, kThreads, key_value_bytes(a.call), stream, a);
}

}  // namespace

cudaError_t backward_query(const BackwardArguments& a, cudaStream_t stream) {
    switch (a.call.dtype) {
        case DType::float16:
            return run_query<Half>(a, stream);
        case DType::bfloat16:
            return run_query<BFloat16>(a, stream);
        default:
            return run_query<float>(a, stream);
    }
}

cudaError_t backward_key_value(const BackwardArguments& a, cudaStream_t stream) {
    switch (a.call.dtype) {
        case DType::float16:
            return run_key_value<Half>(a, stream);
        case DType::bfloat16:
            return run_key_value<BFloat16>(a, stream);
        default:
            return run_key_value<float>(a, stream);
    }
}

}  // namespace sefi::cuda::simple
