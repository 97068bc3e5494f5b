// Fused backward kernel for tensor cores: dQ, dK_t and dV_t, the last two possibly as partial sums.
//
// A warp computes the probabilities of 16 query rows once, for dQ. For dK_t and dV_t it has keys
// and columns instead, and reads the probabilities of all rows from shared memory as left factors.
#include "cuda/kv_accumulate.h"
#include "cuda/launch.h"
#include "cuda/load_kv.h"
#include "cuda/softmax_bwd.h"
#include "cuda/warp_pair.h"

namespace sefi::cuda::mma {
namespace {

constexpr int kRows = kBlockRows;

// kHalves: number of warps that share 16 rows, two if the registers do not hold the probabilities
// of all keys. kSlots: tiles of query rows in shared memory, two to prefetch the next one.
template <int D, int kSlots>
struct Shape {
    static constexpr int kHalves = D > 80 ? 2 : 1;
    static constexpr int kWarps = kRows / 16 * kHalves, kThreads = 32 * kWarps;
    static constexpr int kCtasPerSm = D > 80 ? 1 : 2;  // that the registers must allow
    static constexpr int kN8 = kKeyN8 / kHalves;       // of the keys of a warp
    static constexpr int kTile = kRows * Layout<D>::kStride;
    static constexpr int kExchange = kHalves == 1 ? 0 : kWarps / 2 * WarpPair::kBytes;
    static constexpr int kBytes = 3 * Layout<D>::kTile + (1 + kSlots) * kTile +
                                  kRows * kProbsStride + kExchange + 4 * 2 * kKeys;
};

template <class Shape>
int occupancy() {
    return cuda::occupancy(Shape::kBytes, Shape::kCtasPerSm);
}

// Whether a single slot lets one more block fit on a multiprocessor, as with head_dim 80 on sm_80.
bool single_slot() { return occupancy<Shape<80, 1>>() > occupancy<Shape<80, 2>>(); }

// Store the probabilities of a warp, or their gradients, where all warps read them.
template <class E, int kN8>
SEFI_DEVICE void share_probs(const float (&probs)[kN8][4], char* rows) {
    char* const to = rows + lane() / 4 * kProbsStride + lane() % 4 * 4;
#pragma unroll
    for (int n = 0; n < kN8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            *reinterpret_cast<uint32_t*>(to + r * 8 * kProbsStride + 16 * n) =
                pack<E>(probs[n][2 * r], probs[n][2 * r + 1]);
        }
    }
}

template <int D, class E, bool kReference, int kSlots>
__global__ void __launch_bounds__(Shape<D, kSlots>::kThreads, Shape<D, kSlots>::kCtasPerSm)
    attn_bwd_kernel(const BwdParams a) {
    using S = Shape<D, kSlots>;
    constexpr int kTile = Layout<D>::kTile, kStride = Layout<D>::kStride, kThreads = S::kThreads;
    constexpr bool kPaired = S::kHalves == 2;
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const bool with_grad_output = call.grad_output.data != nullptr;
    char* const key = shared_memory();
    char* const value = key + kTile;
    char* const reference = value + kTile;
    char* const outputs = reference + kTile;
    char* const slots = outputs + S::kTile;
    char* const weights = slots + kSlots * S::kTile;  // A_t, then dS_t
    char* const exchange = weights + kRows * kProbsStride;
    float* const bias = reinterpret_cast<float*>(exchange + S::kExchange);
    float* const loss_factor = bias + kKeys;  // 2 g w / H
    const int begin = a.split.begin(), end = a.split.end(call);
    const RowCopies<D, E, kRows, kThreads> queries(call.query, b, h);
    const RowCopies<D, E, kRows, kThreads> grad_outputs(call.grad_output, b, h);
    queries.copy(begin, end, shared_address(slots));
    if (with_grad_output) grad_outputs.copy(begin, end, shared_address(outputs));
    cp_async_commit();
    load_kv<D, kThreads, E>(call, b, h, key, with_grad_output ? value : nullptr,
                            kReference ? reference : nullptr, [&] {
                                load_bias(call, b, bias);
                                if (kReference) load_loss_factor(call, b, loss_factor);
                            });

    launch_dependents();
    const int warp = int(threadIdx.x) / 32, warp_row = 16 * (warp / S::kHalves);
    const int first_key = 8 * S::kN8 * (warp % S::kHalves);
    const uint32_t scores = score_offset<D>() + uint32_t(first_key * kStride);
    const uint32_t key_at = shared_address(key), weights_at = shared_address(weights);
    const int lane_row = (warp_row + lane() / 4) * kStride;
    char* const warp_weights = weights + warp_row * kProbsStride + 2 * first_key;
    const Bias key_bias{bias + first_key, hides_only_last(call)};
    const WarpPair pair(exchange);
    const float2 scales = make_float2(call.scale, call.scale);
    const Rows grad_query = Rows::of<E>(call.grad_query, b, h);
    KvAccumulator<D, S::kWarps> key_sums, value_sums;
    int slot = 0;
    for (int first = begin; first < end; first += kRows) {
        char* const tile = slots + slot * S::kTile;
        const bool more = first + kRows < end;
        const int first_row = first + warp_row;
        cp_async_wait<0>();
        // The copies have arrived; all warps have finished with `weights` and with the other slot.
        __syncthreads();
        if constexpr (kSlots == 2) {
            slot = 1 - slot;
            if (more) queries.copy(first + kRows, end, shared_address(slots + slot * S::kTile));
            cp_async_commit();
        }
        uint32_t rows[D / 8][2];
        const auto load = [&](const char* from) {
            load_row<D>(from + lane_row, 0, rows);
            load_row<D>(from + lane_row + 8 * kStride, 1, rows);
            opaque_barrier(rows);
        };
        const auto normalize = [&](auto&... softmaxes) {
            if constexpr (kPaired) {
                pair.normalize(a.sm_scale_log2, softmaxes...);
            } else {
                mma::normalize(a.sm_scale_log2, softmaxes...);
            }
        };
        float probs[S::kN8][4], d_probs[S::kN8][4], delta[2];
        Softmax softmax(probs), ref_softmax(d_probs);
        load(tile);
        score_keys<D, E>(rows, key_at + scores, key_bias, probs);
        if constexpr (kReference) {
            score_keys<D, E>(rows, shared_address(reference) + scores, key_bias, d_probs);
            normalize(softmax, ref_softmax);
            loss_gradient(probs, loss_factor + first_key, d_probs);
        } else {
            normalize(softmax);
            clear(d_probs);
        }
        if (with_grad_output) {
            share_probs<E>(probs, warp_weights);
            load(outputs);
            multiply_keys<D, E>(rows, shared_address(value) + scores, d_probs);
        }
        add_probs_grads(a, b, first_row, end, first_key, d_probs);
        row_delta(probs, d_probs, delta);
        if constexpr (kPaired) pair.put(delta);
        // A_t and delta of all warps are stored.
        __syncthreads();
        if (with_grad_output)
            value_sums.template add<E, kRows>(weights_at, shared_address(outputs));
        if constexpr (kPaired) pair.add(delta);
        softmax_backward(probs, delta, d_probs);
        // All warps have finished with A_t and with the output gradients.
        __syncthreads();
        if (with_grad_output && more) {
            grad_outputs.copy(first + kRows, end, shared_address(outputs));
            cp_async_commit();
        }
        share_probs<E>(d_probs, warp_weights);
        __syncthreads();
        if (call.grad_query.data) {
            const uint32_t sums = shared_address(key) + sum_offset<D>();
            if constexpr (kPaired) {
                store_half_sum<D, E>(scales, grad_query, first_row, end,
                                     weights_at + uint32_t(warp_row * kProbsStride), sums);
            } else {
                uint32_t packed[kKeySteps][4];
                pack_weights<E>(d_probs, packed);
                store_weighted_sum<D, 0, E>(scales, grad_query, first_row, end,
                                            WeightedTile{packed, sums});
            }
        }
        key_sums.template add<E, kRows>(weights_at, shared_address(tile));
        if (kSlots == 1 && more) {
            __syncthreads();
            queries.copy(first + kRows, end, shared_address(slots));
            cp_async_commit();
        }
    }
    store_gradient<D, E>(a, a.key, call.grad_key, [&](auto* to, int64_t row) {
        key_sums.store(call.scale, call.keys, to, row);
    });
    store_gradient<D, E>(a, a.value, call.grad_value, [&](auto* to, int64_t row) {
        value_sums.store(1.0f, call.keys, to, row);
    });
}

template <int D, class E, bool kReference, int kSlots>
cudaError_t run(const BwdParams& a, cudaStream_t stream) {
    using S = Shape<D, kSlots>;
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits));
    return launch(attn_bwd_kernel<D, E, kReference, kSlots>, grid, S::kThreads, S::kBytes, stream,
                  a);
}

}  // namespace

bool fuses_dq(const BackwardCall& call) {
    if (!call.grad_key.data || (call.reference_grad && call.with_reference())) return false;
    return call.head_dim <= 80 || occupancy<Shape<160, 2>>() > 0;
}

int bwd_ctas_per_sm(int64_t head_dim) {
    if (head_dim == 80 && single_slot()) return occupancy<Shape<80, 1>>();
    return for_head_dim(head_dim, [](auto dim) {
        return std::max(occupancy<Shape<decltype(dim)::value, 2>>(), 1);
    });
}

cudaError_t attn_bwd(const BwdParams& a, cudaStream_t stream) {
    return for_kernel(a.call, a.with_reference, [&](auto dim, auto element, auto reference) {
        constexpr int D = decltype(dim)::value;
        constexpr bool kReference = decltype(reference)::value;
        if constexpr (D == 80) {
            if (single_slot()) return run<D, decltype(element), kReference, 1>(a, stream);
        }
        return run<D, decltype(element), kReference, 2>(a, stream);
    });
}

}  // namespace sefi::cuda::mma
