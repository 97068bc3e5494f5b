// Forward kernel for any size, layout and dtype: equations 4 and 5 of docs/method.md.
#include "cuda/kernels.h"
#include "cuda/simple.h"
#include "cuda/start.h"

namespace sefi::cuda::simple {
namespace {

size_t shared_bytes(const Problem& p) {
    const size_t row = size_t(p.head_dim | 1), attn_probs = p.reference_key.data ? 2 : 1;
    return 4 * (kRows * (row + attn_probs * size_t(p.keys | 1)) + kPiece + kThreads / 32);
}

template <class E>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ForwardArguments a) {
    const ForwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int keys = int(call.keys), width = int(call.head_dim), stride = padded(keys);
    float* const rows = reinterpret_cast<float*>(shared_memory());
    float* const target = rows + kRows * padded(width);
    float* const anchor = target + kRows * stride;
    float* const piece = call.reference_key.data ? anchor + kRows * stride : anchor;
    float* const warps = piece + kPiece;
    const Rows<E> query(call.query, b, h), key(call.key, b, h), value(call.value, b, h),
        reference(call.reference_key, b, h);
    E* const output = head_of<E>(call.output, b, h);
    const Visible visible(call, b);
    const float* weights =
        call.token_weights ? call.token_weights + b * call.token_weights_batch : nullptr;

    const int row = threadIdx.x / kRowThreads, mine = threadIdx.x % kRowThreads;
    const int64_t begin = blockIdx.y * a.cut.rows_a_block;
    const int64_t end = min(begin + a.cut.rows_a_block, call.queries);
    float distance = 0.0f;
    for (int64_t first = begin; first < end; first += kRows) {
        __syncthreads();
        stage<kRows>(query, first, end, width, rows);
        inner_products(rows, key, keys, width, visible, piece, target);
        float* const probabilities = target + row * stride;
        softmax(probabilities, keys, mine, visible, a.cut);
        if (call.reference_key.data) {
            inner_products(rows, reference, keys, width, visible, piece, anchor);
            const float* const others = anchor + row * stride;
            softmax(anchor + row * stride, keys, mine, visible, a.cut);
            for (int k = mine; first + row < end && k < keys; k += kRowThreads) {
                const float difference = probabilities[k] - others[k];
                const float weight = weights ? weights[k] : 1.0f;
                distance = fmaf(weight * difference, difference, distance);
            }
        }
        __syncthreads();
        if (a.attn_probs && first + row < end) {
            const int64_t* tokens = call.probs_positions + b * call.probs_positions_batch;
            for (int64_t t = mine; t < call.probs_count; t += kRowThreads) {
                const bool inside = tokens[t] >= 0 && tokens[t] < keys;
                a.attn_probs[(blockIdx.x * call.probs_count + t) * call.queries + first + row] =
                    inside ? probabilities[tokens[t]] : 0.0f;
            }
        }
        weighted_sums(target, value, nullptr, value, keys, width, visible, piece,
                      [&](int r, int column, float sum) {
                          if (first + r >= end) return;
                          narrow(sum, output[(first + r) * call.output.row + column]);
                      });
    }
    if (!a.partials) return;
    for (int step = 1; step < 32; step *= 2) distance += __shfl_xor_sync(~0u, distance, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = distance;
    __syncthreads();
    if (threadIdx.x) return;
    float total = 0.0f;
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
    a.partials[blockIdx.x * a.cut.splits + blockIdx.y] = total;
}

template <class E>
cudaError_t run(const ForwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(forward_kernel<E>, grid, kThreads, shared_bytes(a.call), stream, a);
}

}  // namespace

cudaError_t forward(const ForwardArguments& a, cudaStream_t stream) {
    switch (a.call.dtype) {
        case DType::float16:
            return run<Half>(a, stream);
        case DType::bfloat16:
            return run<BFloat16>(a, stream);
        default:
            return run<float>(a, stream);
    }
}

}  // namespace sefi::cuda::simple
