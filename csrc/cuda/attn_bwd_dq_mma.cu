// Backward kernel for tensor cores: dQ, and the row statistics that the dK/dV kernel reads.
#include "cuda/launch.h"
#include "cuda/load_kv.h"
#include "cuda/softmax_bwd.h"

namespace sefi::cuda::mma {
namespace {

template <int D>
constexpr int kWarps = D > 80 ? 8 : 4;

template <int D, bool kReference>
size_t shared_bytes(const BwdParams& a) {
    const size_t tiles = 1 + (a.call.grad_output.data ? 1 : 0) + (kReference ? 1 : 0);
    return tiles * Layout<D>::kTile + 4 * 2 * kKeys;
}

template <int D, class E, bool kReference>
__global__ void __launch_bounds__(32 * kWarps<D>) attn_bwd_dq_kernel(const BwdParams a) {
    constexpr int kThreads = 32 * kWarps<D>, kTile = Layout<D>::kTile;
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const bool with_grad_output = call.grad_output.data != nullptr;
    char* const key = shared_memory();
    char* const value = key + kTile;
    char* const reference = with_grad_output ? value + kTile : value;
    float* const bias = reinterpret_cast<float*>(kReference ? reference + kTile : reference);
    float* const loss_factor = bias + kKeys;  // 2 g w / H
    const Rows query = Rows::of<E>(call.query, b, h);
    const Rows grad_output = Rows::of<E>(call.grad_output, b, h);
    const Rows grad_query = Rows::of<E>(call.grad_query, b, h);
    float* const row_stats = a.row_stats + blockIdx.x * kRowStats * a.padded_rows;
    const int begin = a.split.begin(), end = a.split.end(call);
    // The dK/dV kernel reads row_stats in whole tiles.
    const int padded_end = int(min(begin + a.split.rows_per_cta, a.padded_rows));
    const int warp = int(threadIdx.x) / 32;
    uint32_t rows[D / 8][2];
    load_kv<D, kThreads, E>(call, b, h, key, with_grad_output ? value : nullptr,
                            kReference ? reference : nullptr, [&] {
                                load_bias(call, b, bias);
                                if (kReference) load_loss_factor(call, b, loss_factor);
                                load_rows<D>(query, begin + 16 * warp, end, rows);
                            });
    __syncthreads();

    const Bias key_bias{bias, hides_only_last(call)};
    const uint32_t scores = score_offset<D>(), sums = sum_offset<D>();
    const uint32_t key_at = shared_address(key), value_at = shared_address(value),
                   reference_at = shared_address(reference);
    for (int first = begin + 16 * warp; first < padded_end; first += 16 * kWarps<D>) {
        const auto store_stat = [&](int which, const auto& number, float padding) {
            if (lane() % 4) return;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = first + lane() / 4 + 8 * r;
                row_stats[which * a.padded_rows + row] = row < end ? number(r) : padding;
            }
        };
        float probs[kKeyN8][4], d_probs[kKeyN8][4], delta[2];
        Softmax softmax(probs), ref_softmax(d_probs);
        opaque_barrier(rows);
        score_keys<D, E>(rows, key_at + scores, key_bias, probs);
        if constexpr (kReference) score_keys<D, E>(rows, reference_at + scores, key_bias, d_probs);
        // Loaded early, so that the loads overlap the softmax.
        if (with_grad_output) load_rows<D>(grad_output, first, end, rows);
        uint32_t ref_d_scores[kKeySteps][4] = {};
        if constexpr (kReference) {
            normalize(a.sm_scale_log2, softmax, ref_softmax);
            store_stat(kRefStats + kLse, [&](int r) { return ref_softmax.lse(r); }, INFINITY);
            if (a.reference_grad) {
                float ref_probs[kKeyN8][4];
#pragma unroll
                for (int i = 0; i < 4 * kKeyN8; ++i)
                    ref_probs[i / 4][i % 4] = d_probs[i / 4][i % 4];
                loss_gradient(probs, loss_factor, d_probs);
                row_delta(ref_probs, d_probs, delta);
                store_stat(kRefStats + kDelta, [&](int r) { return -delta[r]; }, 0.0f);
#pragma unroll
                for (int n = 0; n < kKeyN8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) ref_probs[n][i] *= delta[i / 2] - d_probs[n][i];
                }
                pack_weights<E>(ref_probs, ref_d_scores);
            } else {
                loss_gradient(probs, loss_factor, d_probs);
            }
        } else {
            normalize(a.sm_scale_log2, softmax);
            clear(d_probs);
        }
        store_stat(kLse, [&](int r) { return softmax.lse(r); }, INFINITY);
        if (with_grad_output) multiply_keys<D, E>(rows, value_at + scores, d_probs);
        load_rows<D>(query, first + 16 * kWarps<D>, end, rows);
        add_probs_grads(a, b, first, end, 0, d_probs);
        row_delta(probs, d_probs, delta);
        store_stat(kDelta, [&](int r) { return delta[r]; }, 0.0f);
        if (!call.grad_query.data) continue;
        softmax_backward(probs, delta, d_probs);
        uint32_t d_scores[kKeySteps][4];
        pack_weights<E>(d_probs, d_scores);
        store_weighted_sum<D, 0, E>(
            make_float2(call.scale, call.scale), grad_query, first, end,
            WeightedTile{d_scores, key_at + sums},
            WeightedTile{ref_d_scores, reference_at + sums, a.reference_grad});
    }
}

}  // namespace

cudaError_t attn_bwd_dq(const BwdParams& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits));
    return for_kernel(a.call, a.with_reference, [&](auto dim, auto element, auto reference) {
        constexpr int D = decltype(dim)::value;
        constexpr bool kReference = decltype(reference)::value;
        return launch(attn_bwd_dq_kernel<D, decltype(element), kReference>, grid, 32 * kWarps<D>,
                      shared_bytes<D, kReference>(a), stream, a);
    });
}

}  // namespace sefi::cuda::mma
