// Sums of partial results, each by one thread or block in a fixed order: the same bits every time.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/start.h"

namespace sefi::cuda {
namespace {

constexpr int kThreads = 256;

unsigned blocks(int64_t entries) { return unsigned((entries + kThreads - 1) / kThreads); }

// One block a sample.
__global__ void __launch_bounds__(kThreads) subject_loss_kernel(const SubjectLossArguments a) {
    double* const sums = reinterpret_cast<double*>(shared_memory());
    wait_for_previous();
    const int64_t count = a.heads * a.splits;
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

__global__ void __launch_bounds__(kThreads) mean_kernel(const MapArguments a) {
    wait_for_previous();
    const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (place >= a.count) return;
    const float* all = a.all + place / a.entries * a.heads * a.entries + place % a.entries;
    float sum = 0.0f;
    for (int64_t h = 0; h < a.heads; ++h) sum += all[h * a.entries];
    a.mean[place] = sum / float(a.heads);
}

// So many threads at most share numbers: one alone would wait for one partial sum after the other.
// But each more costs blocks, and starting these takes longest where so many fill the device.
constexpr int kMostParts = 8, kManyBlocks = 1024;

// Grid: heads of all samples, pieces of one head's sums, gradients. Of a gradient that all samples
// share, the first sample's blocks add up everything. A thread has kWide neighbouring numbers, and
// of their partial sums each `parts`-th.
template <class E, int kWide>
__global__ void __launch_bounds__(kThreads) total_kernel(const TotalArguments a) {
    const Total& total = a.totals[blockIdx.z];
    const unsigned heads = unsigned(a.heads), width = unsigned(a.head_dim);
    const unsigned b = blockIdx.x / heads, h = blockIdx.x % heads, splits = unsigned(a.splits);
    if (total.result.shared && b > 0) return;
    const int threads = kThreads / a.parts, thread = int(threadIdx.x) % threads;
    const unsigned part = threadIdx.x / unsigned(threads);
    const unsigned place = kWide * (blockIdx.y * unsigned(threads) + unsigned(thread));
    const unsigned entry = unsigned(a.keys) * width;
    const unsigned samples = total.result.shared ? unsigned(a.batch) : 1;
    const unsigned count = place < entry ? samples * splits : 0;
    const float* const from = total.partials + int64_t(blockIdx.x) * splits * entry + place;
    float sums[kWide] = {};
    wait_for_previous();
#pragma unroll 4
    for (unsigned i = part; i < count; i += unsigned(a.parts)) {
        // Between the samples lie the other heads.
        const int64_t skipped = int64_t(i / splits) * heads * splits + i % splits;
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
    if (a.parts > 1) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
            others[(int(part) * kWide + i) * threads] = sums[i];
        }
        __syncthreads();
    }
    if (part > 0 || place >= entry) return;
    for (int p = 1; p < a.parts; ++p) {
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[i] += others[(p * kWide + i) * threads];
    }
    E* const to = head_of<E>(total.result, b, h) + place / width * total.result.row + place % width;
#pragma unroll
    for (int i = 0; i < kWide; ++i) narrow(sums[i], to[i]);
}

template <class E, int kWide>
cudaError_t run_totals(TotalArguments a, unsigned count, cudaStream_t stream) {
    const auto pieces = [&] {
        const int64_t numbers = kWide * (kThreads / a.parts);
        return (a.keys * a.head_dim + numbers - 1) / numbers;
    };
    int64_t summed = 1, entries = 0;
    for (unsigned i = 0; i < count; ++i) {
        const bool shared = a.totals[i].result.shared;
        summed = std::max(summed, a.splits * (shared ? a.batch : 1));
        entries += a.heads * (shared ? 1 : a.batch);
    }
    while (a.parts < kMostParts && 2 * a.parts <= summed && entries * pieces() < kManyBlocks) {
        a.parts *= 2;
    }
    const dim3 grid(unsigned(a.batch * a.heads), unsigned(pieces()), count);
    return start_early(total_kernel<E, kWide>, grid, kThreads, kWide * kThreads * sizeof(float),
                       stream, a);
}

template <class E>
cudaError_t run_totals(const TotalArguments& a, unsigned count, cudaStream_t stream) {
    // So every four begin at 16 bytes and lie in one row.
    return a.head_dim % 4 ? run_totals<E, 1>(a, count, stream) : run_totals<E, 4>(a, count, stream);
}

}  // namespace

cudaError_t sum_subject_loss(const SubjectLossArguments& a, cudaStream_t stream) {
    return start_early(subject_loss_kernel, dim3(unsigned(a.batch)), kThreads,
                       kThreads * sizeof(double), stream, a);
}

cudaError_t mean_maps(const MapArguments& a, cudaStream_t stream) {
    return start_early(mean_kernel, dim3(blocks(a.count)), kThreads, 0, stream, a);
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
