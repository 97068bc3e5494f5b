// Reductions of partial results in a fixed order, so that results repeat bit for bit.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace sefi::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks(int64_t entries) { return unsigned((entries + kThreads - 1) / kThreads); }

// One block per sample.
__global__ void __launch_bounds__(kThreads) reduce_loss_kernel(const ReduceLossParams a) {
    double* const sums = reinterpret_cast<double*>(shared_memory());
    wait_for_dependency();
    const int64_t count = a.heads * a.num_splits;
    const float* partials = a.partials + blockIdx.x * count;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; a.partials && i < count; i += kThreads) sum += partials[i];
    sums[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) a.subject_loss[blockIdx.x] = float(sums[0] / double(a.heads));
}

__global__ void __launch_bounds__(kThreads) average_heads_kernel(const AverageHeadsParams a) {
    wait_for_dependency();
    const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (place >= a.count) return;
    const float* all = a.all + place / a.entries * a.heads * a.entries + place % a.entries;
    float sum = 0.0f;
    for (int64_t h = 0; h < a.heads; ++h) sum += all[h * a.entries];
    a.mean[place] = sum / float(a.heads);
}

// Several threads share a sum, because one alone would wait for each partial sum in turn. More
// threads need more blocks, whose launch dominates once they fill the device.
constexpr int kMaxThreadsPerSum = 8, kEnoughCtas = 1024;

// Grid: batch * heads, pieces of the sums of one head, gradients. If all samples share a gradient,
// the blocks of the first sample sum over the batch too. A thread adds every threads_per_sum-th
// partial sum of kWide adjacent numbers.
template <class E, int kWide>
__global__ void __launch_bounds__(kThreads) reduce_splits_kernel(const ReduceSplitsParams a) {
    const SplitGradient& gradient = a.gradients[blockIdx.z];
    const unsigned heads = unsigned(a.heads), head_dim = unsigned(a.head_dim);
    const unsigned b = blockIdx.x / heads, h = blockIdx.x % heads,
                   num_splits = unsigned(a.num_splits);
    if (gradient.result.shared && b > 0) return;
    const int threads = kThreads / a.threads_per_sum, thread = int(threadIdx.x) % threads;
    const unsigned sum_thread = threadIdx.x / unsigned(threads);
    const unsigned place = kWide * (blockIdx.y * unsigned(threads) + unsigned(thread));
    const unsigned entry = unsigned(a.keys) * head_dim;
    const unsigned samples = gradient.result.shared ? unsigned(a.batch) : 1;
    const unsigned count = place < entry ? samples * num_splits : 0;
    const float* const from = gradient.partials + int64_t(blockIdx.x) * num_splits * entry + place;
    float sums[kWide] = {};
    wait_for_dependency();
#pragma unroll 4
    for (unsigned i = sum_thread; i < count; i += unsigned(a.threads_per_sum)) {
        // The other heads lie between two samples.
        const int64_t skipped = int64_t(i / num_splits) * heads * num_splits + i % num_splits;
        const float* const one = from + skipped * entry;
        if constexpr (kWide == 4) {
            const float4 four = *reinterpret_cast<const float4*>(one);
            sums[0] += four.x;
            sums[1] += four.y;
            sums[2] += four.z;
            sums[3] += four.w;
        } else {
            sums[0] += *one;
        }
    }
    float* const others = reinterpret_cast<float*>(shared_memory()) + thread;
    if (a.threads_per_sum > 1) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
            others[(int(sum_thread) * kWide + i) * threads] = sums[i];
        }
        __syncthreads();
    }
    if (sum_thread > 0 || place >= entry) return;
    for (int p = 1; p < a.threads_per_sum; ++p) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[i] += others[(p * kWide + i) * threads];
    }
    E* const to = head_of<E>(gradient.result, b, h) + place / head_dim * gradient.result.row +
                  place % head_dim;
#pragma unroll
    for (int i = 0; i < kWide; ++i) store_float(sums[i], to[i]);
}

template <class E, int kWide>
cudaError_t run_reduce_splits(ReduceSplitsParams a, unsigned count, cudaStream_t stream) {
    const auto pieces = [&] {
        const int64_t numbers = kWide * (kThreads / a.threads_per_sum);
        return (a.keys * a.head_dim + numbers - 1) / numbers;
    };
    int64_t summed = 1, entries = 0;
    for (unsigned i = 0; i < count; ++i) {
        const bool shared = a.gradients[i].result.shared;
        summed = std::max(summed, a.num_splits * (shared ? a.batch : 1));
        entries += a.heads * (shared ? 1 : a.batch);
    }
    while (a.threads_per_sum < kMaxThreadsPerSum && 2 * a.threads_per_sum <= summed &&
           entries * pieces() < kEnoughCtas) {
        a.threads_per_sum *= 2;
    }
    const dim3 grid(unsigned(a.batch * a.heads), unsigned(pieces()), count);
    return launch_pdl(reduce_splits_kernel<E, kWide>, grid, kThreads,
                      kWide * kThreads * sizeof(float), stream, a);
}

}  // namespace

cudaError_t reduce_loss(const ReduceLossParams& a, cudaStream_t stream) {
    return launch_pdl(reduce_loss_kernel, dim3(unsigned(a.batch)), kThreads,
                      kThreads * sizeof(double), stream, a);
}

cudaError_t average_heads(const AverageHeadsParams& a, cudaStream_t stream) {
    return launch_pdl(average_heads_kernel, dim3(blocks(a.count)), kThreads, 0, stream, a);
}

cudaError_t reduce_splits(const ReduceSplitsParams& wanted, cudaStream_t stream) {
    ReduceSplitsParams a = wanted;
    unsigned count = 0;
    for (const SplitGradient& gradient : wanted.gradients) {
        if (gradient.partials) a.gradients[count++] = gradient;
    }
    if (!count) return cudaSuccess;
    return for_dtype(a.dtype, [&](auto element) {
        using E = decltype(element);
        // Four numbers of a thread start at a multiple of 16 bytes and lie in one row.
        return a.head_dim % 4 ? run_reduce_splits<E, 1>(a, count, stream)
                              : run_reduce_splits<E, 4>(a, count, stream);
    });
}

}  // namespace sefi::cuda
