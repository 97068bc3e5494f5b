// Forward kernel for any size, layout and dtype: equations 4 and 5 of docs/method.md.
#include "cuda/attn_simt.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sefi::cuda::simt {
namespace {

size_t shared_bytes(const Problem& p) {
    const size_t row = size_t(p.head_dim | 1), softmaxes = p.reference_key.data ? 2 : 1;
    return 4 * (kRows * (row + softmaxes * size_t(p.keys | 1)) + kKeyTile + kThreads / 32);
}

template <class E>
__global__ void __launch_bounds__(kThreads) attn_fwd_kernel(const FwdParams a) {
    const ForwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int keys = int(call.keys), head_dim = int(call.head_dim), stride = padded(keys);
    float* const rows = reinterpret_cast<float*>(shared_memory());
    float* const probs = rows + kRows * padded(head_dim);
    float* const ref_probs = probs + kRows * stride;
    float* const key_tile = call.reference_key.data ? ref_probs + kRows * stride : ref_probs;
    float* const warp_loss = key_tile + kKeyTile;
    const Rows<E> query(call.query, b, h), key(call.key, b, h), value(call.value, b, h),
        reference(call.reference_key, b, h);
    E* const output = head_of<E>(call.output, b, h);
    const Visible visible(call, b);
    const float* weights =
        call.token_weights ? call.token_weights + b * call.token_weights_batch : nullptr;

    const int row = threadIdx.x / kRowThreads, lane = threadIdx.x % kRowThreads;
    const int64_t begin = blockIdx.y * a.split.rows_per_cta;
    const int64_t end = min(begin + a.split.rows_per_cta, call.queries);
    float loss = 0.0f;
    for (int64_t first = begin; first < end; first += kRows) {
        __syncthreads();
        load_tile<kRows>(query, first, end, head_dim, rows);
        multiply_keys(rows, key, keys, head_dim, visible, key_tile, probs);
        float* const probs_row = probs + row * stride;
        softmax(probs_row, keys, lane, visible, a);
        if (call.reference_key.data) {
            multiply_keys(rows, reference, keys, head_dim, visible, key_tile, ref_probs);
            float* const ref_row = ref_probs + row * stride;
            softmax(ref_row, keys, lane, visible, a);
            for (int k = lane; first + row < end && k < keys; k += kRowThreads) {
                const float difference = probs_row[k] - ref_row[k];
                const float weight = weights ? weights[k] : 1.0f;
                loss = fmaf(weight * difference, difference, loss);
            }
        }
        __syncthreads();
        if (a.attn_probs && first + row < end) {
            const int64_t* positions = call.probs_positions + b * call.probs_positions_batch;
            for (int64_t t = lane; t < call.probs_count; t += kRowThreads) {
                const bool inside = positions[t] >= 0 && positions[t] < keys;
                a.attn_probs[(blockIdx.x * call.probs_count + t) * call.queries + first + row] =
                    inside ? probs_row[positions[t]] : 0.0f;
            }
        }
        weighted_sums(probs, value, nullptr, value, keys, head_dim, visible, key_tile,
                      [&](int r, int column, float sum) {
                          if (first + r >= end) return;
                          store_float(sum, output[(first + r) * call.output.row + column]);
                      });
    }
    if (!a.partials) return;
    for (int step = 1; step < 32; step *= 2) loss += __shfl_xor_sync(~0u, loss, step);
    if (threadIdx.x % 32 == 0) warp_loss[threadIdx.x / 32] = loss;
    __syncthreads();
    if (threadIdx.x) return;
    float total = 0.0f;
    for (int w = 0; w < kThreads / 32; ++w) total += warp_loss[w];
    a.partials[blockIdx.x * a.split.num_splits + blockIdx.y] = total;
}

}  // namespace

cudaError_t attn_fwd(const FwdParams& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits));
    return for_dtype(a.call.dtype, [&](auto element) {
        return launch(attn_fwd_kernel<decltype(element)>, grid, kThreads, shared_bytes(a.call),
                      stream, a);
    });
}

}  // namespace sefi::cuda::simt
