// Forward kernel for tensor cores, 16 query rows per warp: equations 4 and 5 of docs/method.md.
#include "cuda/launch.h"
#include "cuda/load_kv.h"
#include "cuda/softmax.h"

namespace sefi::cuda::mma {
namespace {

// Wide heads fill shared memory with one block, so it has more warps.
template <int D>
constexpr int kWarps = D > 80 ? 8 : 4;

// Blocks per multiprocessor that the registers must allow.
template <int D>
constexpr int kCtasPerSm = D > 80 ? 1 : 4;

// Whether the registers hold the next rows besides two softmaxes.
template <int D>
constexpr bool kPrefetch = D != 80;

template <int D, bool kReference>
constexpr int kBytes = (kReference ? 3 : 2) * Layout<D>::kTile + 4 * (2 * kKeys + kWarps<D>);

// Store one column of probabilities; zeros for a position that does not exist.
SEFI_DEVICE void store_probs_column(const float (&powers)[kKeyN8][4], const float (&inv_sum)[2],
                                    int64_t position, int first, int end, float* to) {
    const int t = lane() % 4;
    const bool exists = position >= 0 && position < kKeys;
    const int column = exists ? int(position) : 0;
    if (column % 8 / 2 != t) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float picked = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeyN8; ++n) {
            const float number = column % 2 ? powers[n][2 * r + 1] : powers[n][2 * r];
            picked = exists && column / 8 == n ? number : picked;
        }
        const int row = first + lane() / 4 + 8 * r;
        if (row < end) to[row] = inv_sum[r] * picked;
    }
}

// Add the weighted squares of A_t - A_r. Both are still powers, so that only the sum of a row is
// divided. Rows of equal powers, and the zeros past the last row, give exactly 0.
SEFI_DEVICE void add_loss(const Softmax<kKeyN8>& target, const Softmax<kKeyN8>& ref,
                          const float (&inv_sum)[2], const float* weights, float (&loss)[2]) {
    float ratios[2], sums[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float ratio = target.row_sum[r] * ref.inv_sum(r);
        ratios[r] = target.row_sum[r] == ref.row_sum[r] ? 1.0f : ratio;
    }
#pragma unroll
    for (int n = 0; n < kKeyN8; ++n) {
        const float2 weight = of_columns(weights, n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float difference = fmaf(-ratios[i / 2], ref.probs[n][i], target.probs[n][i]);
            const float own = i % 2 ? weight.y : weight.x;
            sums[i / 2] = fmaf(own * difference, difference, sums[i / 2]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        loss[r] = fmaf(inv_sum[r] * inv_sum[r], sums[r], loss[r]);
    }
}

template <int D, class E, bool kReference>
__global__ void __launch_bounds__(32 * kWarps<D>, kCtasPerSm<D>)
    attn_fwd_kernel(const FwdParams a) {
    constexpr int kThreads = 32 * kWarps<D>, kTile = Layout<D>::kTile;
    const ForwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    char* const key = shared_memory();
    char* const value = key + kTile;
    char* const reference = value + kTile;
    float* const bias = reinterpret_cast<float*>(kReference ? reference + kTile : reference);
    float* const weights = bias + kKeys;
    float* const warp_loss = weights + kKeys;
    const Rows query = Rows::of<E>(call.query, b, h), output = Rows::of<E>(call.output, b, h);
    const int begin = a.split.begin(), end = a.split.end(call);
    const int warp = int(threadIdx.x) / 32;
    uint32_t rows[D / 8][2];
    load_kv<D, kThreads, E>(call, b, h, key, value, kReference ? reference : nullptr, [&] {
        load_bias(call, b, bias);
        load_weights(call, b, weights);
        if (kPrefetch<D>) load_rows<D>(query, begin + 16 * warp, end, rows);
    });
    launch_dependents();
    __syncthreads();

    const uint32_t key_scores = shared_address(key) + score_offset<D>();
    const uint32_t reference_scores = shared_address(reference) + score_offset<D>();
    const uint32_t value_sums = shared_address(value) + sum_offset<D>();
    const Bias key_bias{bias, hides_only_last(call)};
    float loss[2] = {};
    for (int first = begin + 16 * warp; first < end; first += 16 * kWarps<D>) {
        if (!kPrefetch<D>) load_rows<D>(query, first, end, rows);
        float probs[kKeyN8][4], ref_probs[kKeyN8][4];
        Softmax softmax(probs), ref_softmax(ref_probs);
        opaque_barrier(rows);
        score_keys<D, E>(rows, key_scores, key_bias, probs);
        if constexpr (kReference) score_keys<D, E>(rows, reference_scores, key_bias, ref_probs);
        if (kPrefetch<D>) {
            load_rows<D>(query, first + 16 * kWarps<D>, end, rows);
        }
        if constexpr (kReference) {
            find_powers<true>(a.sm_scale_log2, softmax, ref_softmax);
        } else {
            find_powers<true>(a.sm_scale_log2, softmax);
        }
        const float inv_sum[2] = {softmax.inv_sum(0), softmax.inv_sum(1)};
        if constexpr (kReference) {
            add_loss(softmax, ref_softmax, inv_sum, weights, loss);
        }
        for (int64_t t = 0; a.attn_probs && t < call.probs_count; ++t) {
            const int64_t position = call.probs_positions[b * call.probs_positions_batch + t];
            store_probs_column(probs, inv_sum, position < call.keys ? position : -1, first, end,
                               a.attn_probs + (blockIdx.x * call.probs_count + t) * call.queries);
        }
        uint32_t packed[kKeySteps][4];
        pack_weights<E>(probs, packed);
        store_weighted_sum<D, 0, E>(make_float2(inv_sum[0], inv_sum[1]), output, first, end,
                                    WeightedTile{packed, value_sums});
    }
    if (!a.partials) return;
    // A single visible key has probability 1 in A_t and A_r, so the loss is 0; NaN stays.
    float own = (loss[0] + loss[1]) * (key_bias.shows_several() ? 1.0f : 0.0f);
    for (int step = 1; step < 32; step *= 2) own += __shfl_xor_sync(kAllLanes, own, step);
    if (lane() == 0) warp_loss[warp] = own;
    __syncthreads();
    if (threadIdx.x) return;
    float total = 0.0f;
    for (int w = 0; w < kWarps<D>; ++w) total += warp_loss[w];
    a.partials[blockIdx.x * a.split.num_splits + blockIdx.y] = total;
}

}  // namespace

int fwd_ctas_per_sm(int64_t head_dim) {
    return for_head_dim(head_dim, [](auto dim) {
        constexpr int D = decltype(dim)::value;
        return std::max(occupancy(kBytes<D, true>, kCtasPerSm<D>), 1);
    });
}

cudaError_t attn_fwd(const FwdParams& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits));
    return for_kernel(a.call, a.call.reference_key.data,
                      [&](auto dim, auto element, auto reference) {
                          constexpr int D = decltype(dim)::value;
                          constexpr bool kReference = decltype(reference)::value;
                          return launch(attn_fwd_kernel<D, decltype(element), kReference>, grid,
                                        32 * kWarps<D>, kBytes<D, kReference>, stream, a);
                      });
}

}  // namespace sefi::cuda::mma
