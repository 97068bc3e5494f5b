// Sums of partial results, each by one thread or block in a fixed order: the same bits every time.
#include "cuda/kernels.h"
#include "cuda/start.h"

namespace sefi::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks(int64_t entries) { return unsigned((entries + kThreads - 1) / kThreads); }

// One block a sample.
__global__ void __launch_bounds__(kThreads) alignment_kernel(const AlignmentArguments a) {
    double* const sums = reinterpret_cast<double*>(shared_memory());
    const int64_t count = a.heads * a.splits;
    const float* partials = a.partials + blockIdx.x * count;
    double sum = 0.0;
    for (int64_t i = threadIdx.x; a.partials && i < count; i += kThreads) sum += partials[i];
    sums[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) a.alignment[blockIdx.x] = float(sums[0] / double(a.heads));
}

__global__ void __launch_bounds__(kThreads) mean_kernel(const MapArguments a) {
    const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (place >= a.count) return;
    const float* all = a.all + place / a.entries * a.heads * a.entries + place % a.entries;
    float sum = 0.0f;
    for (int64_t h = 0; h < a.heads; ++h) sum += all[h * a.entries];
    a.mean[place] = sum / float(a.heads);
}

// Threads that share one number's partial sums: one thread alone would wait for one after the other.
constexpr int kParts = 8, kNumbers = kThreads / kParts;

// Grid: heads of all samples, pieces of one head's sums, gradients. Of a gradient that all samples
// share, the first sample's blocks add up everything.
template <class E>
__global__ void __launch_bounds__(kThreads) total_kernel(const TotalArguments a) {
    const Total& total = a.totals[blockIdx.z];
    const unsigned heads = unsigned(a.heads), width = unsigned(a.head_dim);
    const unsigned b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int number = int(threadIdx.x) % kNumbers, part = int(threadIdx.x) / kNumbers;
    const unsigned place = blockIdx.y * kNumbers + unsigned(number);
    const int64_t entry = a.keys * a.head_dim;
    if (total.result.shared && b > 0) return;
    float* const sums = reinterpret_cast<float*>(shared_memory());
    float sum = 0.0f;
    for (int64_t sample = b; sample < (total.result.shared ? a.batch : b + 1); ++sample) {
        const float* from = total.partials + (sample * a.heads + h) * a.splits * entry + place;
        for (int64_t s = part; s < a.splits && place < entry; s += kParts) sum += from[s * entry];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part > 0 || place >= entry) return;
#pragma unroll
    for (int p = 1; p < kParts; ++p) sum += sums[p * kNumbers + number];
    E* const rows = head_of<E>(total.result, b, h);
    narrow(sum, rows[place / width * total.result.row + place % width]);
}

template <class E>
cudaError_t run_totals(const TotalArguments& a, unsigned count, cudaStream_t stream) {
    const unsigned pieces = unsigned((a.keys * a.head_dim + kNumbers - 1) / kNumbers);
    const dim3 grid(unsigned(a.batch * a.heads), pieces, count);
    return start(total_kernel<E>, grid, kThreads, kThreads * sizeof(float), stream, a);
}

}  // namespace

cudaError_t sum_alignment(const AlignmentArguments& a, cudaStream_t stream) {
    return start(alignment_kernel, dim3(unsigned(a.batch)), kThreads, kThreads * sizeof(double),
                 stream, a);
}

cudaError_t mean_maps(const MapArguments& a, cudaStream_t stream) {
    return start(mean_kernel, dim3(blocks(a.count)), kThreads, 0, stream, a);
}

cudaError_t sum_totals(const TotalArguments& wanted, cudaStream_t stream) {
    TotalArguments a = wanted;
    unsigned count = 0;
    for (const Total& total : wanted.totals) {
        if (total.partials) a.totals[count++] = total;
    }
    if (!count) return cudaSuccess;
    switch (a.dtype) {
        case DType::float16:
            return run_totals<Half>(a, count, stream);
        case DType::bfloat16:
            return run_totals<BFloat16>(a, count, stream);
        default:
            return run_totals<float>(a, count, stream);
    }
}

}  // namespace sefi::cuda
