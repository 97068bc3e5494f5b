// Backward kernel of the queries for the matrix units: dQ, and what the kernel of the keys needs.
#include "cuda/kernels.h"
#include "cuda/slopes.h"
#include "cuda/start.h"
#include "cuda/streams.h"
#include "cuda/tensor.h"

namespace sefi::cuda::tensor {
namespace {

template <int D>
constexpr int kWarps = D > 80 ? 8 : 4;

template <int D, bool kReference>
size_t shared_bytes(const BackwardArguments& a) {
    const size_t tiles = 1 + (a.call.grad_output.data ? 1 : 0) + (kReference ? 1 : 0);
    return tiles * Layout<D>::kTile + 4 * 2 * kKeys;
}

template <int D, class E, bool kReference>
__global__ void __launch_bounds__(32 * kWarps<D>) query_kernel(const BackwardArguments a) {
    constexpr int kThreads = 32 * kWarps<D>, kTile = Layout<D>::kTile;
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const bool with_output = call.grad_output.data != nullptr;
    char* const key = shared_memory();
    char* const value = key + kTile;
    char* const reference = with_output ? value + kTile : value;
    float* const bias = reinterpret_cast<float*>(kReference ? reference + kTile : reference);
    float* const pull = bias + kKeys;  // 2 g w / H
    const Rows query = Rows::of<E>(call.query, b, h);
    const Rows grad_output = Rows::of<E>(call.grad_output, b, h);
    const Rows grad_query = Rows::of<E>(call.grad_query, b, h);
    float* const statistics = a.statistics + blockIdx.x * kStatistics * a.padded_rows;
    const int begin = a.cut.begin(), end = a.cut.end(call);
    // The kernel of the keys reads whole tiles of statistics.
    const int padded_end = int(min(begin + a.cut.rows_a_block, a.padded_rows));
    const int warp = int(threadIdx.x) / 32;
    uint32_t rows[D / 8][2];
    load_streams<D, kThreads, E>(call, b, h, key, with_output ? value : nullptr,
                                 kReference ? reference : nullptr, [&] {
        load_bias(call, b, bias);
        if (kReference) load_pull(call, b, pull);
        load_rows<D>(query, begin + 16 * warp, end, rows);
    });
    __syncthreads();

    const Bias of_keys{bias, hides_only_last(call)};
    const uint32_t scores = score_offset<D>(), sums = sum_offset<D>();
    const uint32_t key_at = shared_address(key), value_at = shared_address(value),
                   reference_at = shared_address(reference);
    for (int first = begin + 16 * warp; first < padded_end; first += 16 * kWarps<D>) {
        const auto keep = [&](int which, const auto& number, float beyond) {
            if (lane() % 4) return;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = first + lane() / 4 + 8 * r;
                statistics[which * a.padded_rows + row] = row < end ? number(r) : beyond;
            }
        };
        float target[kKeyEights][4], slope[kKeyEights][4], means[2];
        Softmax of_target(target), of_slope(slope);
        settle(rows);
        score_keys<D, E>(rows, key_at + scores, of_keys, target);
        if constexpr (kReference) score_keys<D, E>(rows, reference_at + scores, of_keys, slope);
        // The next rows are on their way while these are worked on.
        if (with_output) load_rows<D>(grad_output, first, end, rows);
        uint32_t reference_slopes[kKeySteps][4] = {};
        if constexpr (kReference) {
            normalise(a.cut.scale_log2, of_target, of_slope);
            keep(kAnchor + kLogSum, [&](int r) { return of_slope.log_sum(r); }, INFINITY);
            if (a.reference_grad) {
                float anchor[kKeyEights][4];
#pragma unroll
                for (int i = 0; i < 4 * kKeyEights; ++i) anchor[i / 4][i % 4] = slope[i / 4][i % 4];
                pull_to_reference(target, pull, slope);
                row_means(anchor, slope, means);
                keep(kAnchor + kMean, [&](int r) { return -means[r]; }, 0.0f);
#pragma unroll
                for (int e = 0; e < kKeyEights; ++e) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) anchor[e][i] *= means[i / 2] - slope[e][i];
                }
                pack_weights<E>(anchor, reference_slopes);
            } else {
                pull_to_reference(target, pull, slope);
            }
        } else {
            normalise(a.cut.scale_log2, of_target);
            clear(slope);
        }
        keep(kLogSum, [&](int r) { return of_target.log_sum(r); }, INFINITY);
        if (with_output) multiply_keys<D, E>(rows, value_at + scores, slope);
        load_rows<D>(query, first + 16 * kWarps<D>, end, rows);
        add_maps(a, b, first, end, 0, slope);
        row_means(target, slope, means);
        keep(kMean, [&](int r) { return means[r]; }, 0.0f);
        if (!call.grad_query.data) continue;
        through_softmax(target, means, slope);
        uint32_t slopes[kKeySteps][4];
        pack_weights<E>(slope, slopes);
        write_sums<D, 0, E>(make_float2(call.scale, call.scale), grad_query, first, end,
                            Weighed{slopes, key_at + sums},
                            Weighed{reference_slopes, reference_at + sums, a.reference_grad});
    }
}

template <int D, class E, bool kReference>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(query_kernel<D, E, kReference>, grid, 32 * kWarps<D>,
                 shared_bytes<D, kReference>(a), stream, a);
}

template <int D, class E>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    return a.with_reference ? run<D, E, true>(a, stream) : run<D, E, false>(a, stream);
}

template <int D>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    return a.call.dtype == DType::float16 ? run<D, Half>(a, stream) : run<D, BFloat16>(a, stream);
}

}  // namespace

cudaError_t backward_query(const BackwardArguments& a, cudaStream_t stream) {
    return for_width(a.call.head_dim,
                     [&](auto width) { return run<decltype(width)::value>(a, stream); });
}

}  // namespace sefi::cuda::tensor
