// Forward kernel of the matrix units: equations 4 and 5 of docs/method.md, 16 rows a warp.
#include "cuda/kernels.h"
#include "cuda/residence.h"
#include "cuda/softmax.h"
#include "cuda/start.h"
#include "cuda/streams.h"
#include "cuda/tensor.h"

namespace sefi::cuda::tensor {
namespace {

// Wide heads fill shared memory: more warps share it.
template <int D>
constexpr int kWarps = D > 80 ? 8 : 4;

// A multiprocessor's registers are to hold so many blocks.
template <int D>
constexpr int kBlocks = D > 80 ? 1 : 4;

// Whether a multiprocessor's registers hold the next rows beside two maps.
template <int D>
constexpr bool kAhead = D != 80;

template <int D, bool kReference>
constexpr int kBytes = (kReference ? 3 : 2) * Layout<D>::kTile + 4 * (2 * kKeys + kWarps<D>);

// One number a row, of the column that a map asks for; zeros for one that does not exist.
SEFI_DEVICE void write_map(const float (&map)[kKeyEights][4], const float (&inverses)[2],
                           int64_t token, int first, int end, float* to) {
    const int t = lane() % 4;
    const bool exists = token >= 0 && token < kKeys;
    const int column = exists ? int(token) : 0;
    if (column % 8 / 2 != t) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float picked = 0.0f;
#pragma unroll
        for (int e = 0; e < kKeyEights; ++e) {
            const float number = column % 2 ? map[e][2 * r + 1] : map[e][2 * r];
            picked = exists && column / 8 == e ? number : picked;
        }
        const int row = first + lane() / 4 + 8 * r;
        if (row < end) to[row] = inverses[r] * picked;
    }
}

// Adds the rows' weighed squares of differences between two maps, which are powers here and no
// probabilities yet: a row's sum is scaled, not each number of both maps. Rows of the same powers
// differ by exactly 0, and so do those past the end, which are zeros.
SEFI_DEVICE void add_distances(const Softmax<kKeyEights>& target, const Softmax<kKeyEights>& anchor,
                               const float (&inverses)[2], const float* weights,
                               float (&distance)[2]) {
    float ratios[2], sums[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float ratio = target.total[r] * anchor.inverse(r);
        ratios[r] = target.total[r] == anchor.total[r] ? 1.0f : ratio;
    }
#pragma unroll
    for (int e = 0; e < kKeyEights; ++e) {
        const float2 weight = of_columns(weights, e);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float difference = fmaf(-ratios[i / 2], anchor.map[e][i], target.map[e][i]);
            const float own = i % 2 ? weight.y : weight.x;
            sums[i / 2] = fmaf(own * difference, difference, sums[i / 2]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        distance[r] = fmaf(inverses[r] * inverses[r], sums[r], distance[r]);
    }
}

template <int D, class E, bool kReference>
__global__ void __launch_bounds__(32 * kWarps<D>, kBlocks<D>)
    forward_kernel(const ForwardArguments a) {
    constexpr int kThreads = 32 * kWarps<D>, kTile = Layout<D>::kTile;
    const ForwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    char* const key = shared_memory();
    char* const value = key + kTile;
    char* const reference = value + kTile;
    float* const bias = reinterpret_cast<float*>(kReference ? reference + kTile : reference);
    float* const weights = bias + kKeys;
    float* const shares = weights + kKeys;
    const Rows query = Rows::of<E>(call.query, b, h), output = Rows::of<E>(call.output, b, h);
    const int begin = a.cut.begin(), end = a.cut.end(call);
    const int warp = int(threadIdx.x) / 32;
    uint32_t rows[D / 8][2];
    load_streams<D, kThreads, E>(call, b, h, key, value, kReference ? reference : nullptr, [&] {
        load_bias(call, b, bias);
        load_weights(call, b, weights);
        if (kAhead<D>) load_rows<D>(query, begin + 16 * warp, end, rows);
    });
    let_next_start();
    __syncthreads();

    const uint32_t key_scores = shared_address(key) + score_offset<D>();
    const uint32_t reference_scores = shared_address(reference) + score_offset<D>();
    const uint32_t value_sums = shared_address(value) + sum_offset<D>();
    const Bias of_keys{bias, hides_only_last(call)};
    float distance[2] = {};
    for (int first = begin + 16 * warp; first < end; first += 16 * kWarps<D>) {
        if (!kAhead<D>) load_rows<D>(query, first, end, rows);
        float target[kKeyEights][4], anchor[kKeyEights][4];
        Softmax of_target(target), of_anchor(anchor);
        settle(rows);
        score_keys<D, E>(rows, key_scores, of_keys, target);
        if constexpr (kReference) score_keys<D, E>(rows, reference_scores, of_keys, anchor);
        if (kAhead<D>) {
            load_rows<D>(query, first + 16 * kWarps<D>, end, rows);
        }
        if constexpr (kReference) {
            find_powers<true>(a.cut.scale_log2, of_target, of_anchor);
        } else {
            find_powers<true>(a.cut.scale_log2, of_target);
        }
        const float inverses[2] = {of_target.inverse(0), of_target.inverse(1)};
        if constexpr (kReference) {
            add_distances(of_target, of_anchor, inverses, weights, distance);
        }
        for (int64_t t = 0; a.attn_probs && t < call.probs_count; ++t) {
            const int64_t token = call.probs_positions[b * call.probs_positions_batch + t];
            write_map(target, inverses, token < call.keys ? token : -1, first, end,
                      a.attn_probs + (blockIdx.x * call.probs_count + t) * call.queries);
        }
        uint32_t packed[kKeySteps][4];
        pack_weights<E>(target, packed);
        write_sums<D, 0, E>(make_float2(inverses[0], inverses[1]), output, first, end,
                            Weighed{packed, value_sums});
    }
    if (!a.partials) return;
    // Of a single key both maps are 1, which their powers say but for rounding. NaN stays.
    float own = (distance[0] + distance[1]) * (of_keys.shows_several() ? 1.0f : 0.0f);
    for (int step = 1; step < 32; step *= 2) own += __shfl_xor_sync(kAllLanes, own, step);
    if (lane() == 0) shares[warp] = own;
    __syncthreads();
    if (threadIdx.x) return;
    float total = 0.0f;
    for (int w = 0; w < kWarps<D>; ++w) total += shares[w];
    a.partials[blockIdx.x * a.cut.splits + blockIdx.y] = total;
}

template <int D, class E, bool kReference>
cudaError_t run(const ForwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(forward_kernel<D, E, kReference>, grid, 32 * kWarps<D>, kBytes<D, kReference>,
                 stream, a);
}

template <int D, class E>
cudaError_t run(const ForwardArguments& a, cudaStream_t stream) {
    return a.call.reference_key.data ? run<D, E, true>(a, stream) : run<D, E, false>(a, stream);
}

template <int D>
cudaError_t run(const ForwardArguments& a, cudaStream_t stream) {
    return a.call.dtype == DType::float16 ? run<D, Half>(a, stream) : run<D, BFloat16>(a, stream);
}

template <int D>
int blocks() {
    return std::max(fitting(kBytes<D, true>, kBlocks<D>), 1);
}

}  // namespace

int forward_blocks(int64_t head_dim) {
    return for_width(head_dim, [](auto width) { return blocks<decltype(width)::value>(); });
}

cudaError_t forward(const ForwardArguments& a, cudaStream_t stream) {
    return for_width(a.call.head_dim,
                     [&](auto width) { return run<decltype(width)::value>(a, stream); });
}

}  // namespace sefi::cuda::tensor
