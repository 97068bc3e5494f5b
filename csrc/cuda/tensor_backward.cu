// Backward kernel for the matrix units in one pass: dQ, and dK_t and dV_t or partial sums of them.
//
// A warp first has the maps of 16 query rows, which are computed once and give dQ. Then it has keys
// and columns: all rows' maps come to it through shared memory, as left factors of the sums over
// the rows.
#include "cuda/kernels.h"
#include "cuda/key_sums.h"
#include "cuda/residence.h"
#include "cuda/row_copies.h"
#include "cuda/slopes.h"
#include "cuda/start.h"
#include "cuda/streams.h"
#include "cuda/tensor.h"
#include "cuda/warp_pair.h"

namespace sefi::cuda::tensor {
namespace {

constexpr int kRows = kBlockRows;

// kHalves: warps that share 16 rows, each with half of the keys; two where registers do not hold
// all keys' maps beside the rows and the sums. kSlots: tiles of query rows in shared memory, two
// where the next one is on its way.
template <int D, int kSlots>
struct Shape {
    static constexpr int kHalves = D > 80 ? 2 : 1;
    static constexpr int kWarps = kRows / 16 * kHalves, kThreads = 32 * kWarps;
    static constexpr int kBlocks = D > 80 ? 1 : 2;  // a multiprocessor, by their registers
    static constexpr int kEights = kKeyEights / kHalves;  // of a warp's keys
    static constexpr int kTile = kRows * Layout<D>::kStride;
    static constexpr int kExchange = kHalves == 1 ? 0 : kWarps / 2 * WarpPair::kBytes;
    static constexpr int kBytes = 3 * Layout<D>::kTile + (1 + kSlots) * kTile +
                                  kRows * kMapStride + kExchange + 4 * 2 * kKeys;
};

template <class Shape>
int fitting() {
    return cuda::fitting(Shape::kBytes, Shape::kBlocks);
}

// Whether one slot lets one block more on a multiprocessor: at 80 columns on 8.0.
template <int D>
bool small() {
    if constexpr (D == 80) {
        return fitting<Shape<D, 1>>() > fitting<Shape<D, 2>>();
    } else {
        return false;
    }
}

// A warp's 16 rows of a map, or its half of these, to where all warps read them.
template <class E, int kEights>
SEFI_DEVICE void share_map(const float (&map)[kEights][4], char* rows) {
    char* const to = rows + lane() / 4 * kMapStride + lane() % 4 * 4;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            *reinterpret_cast<uint32_t*>(to + r * 8 * kMapStride + 16 * e) =
                pack<E>(map[e][2 * r], map[e][2 * r + 1]);
        }
    }
}

template <int D, class E, bool kReference, int kSlots>
__global__ void __launch_bounds__(Shape<D, kSlots>::kThreads, Shape<D, kSlots>::kBlocks)
    backward_kernel(const BackwardArguments a) {
    using S = Shape<D, kSlots>;
    constexpr int kTile = Layout<D>::kTile, kStride = Layout<D>::kStride, kThreads = S::kThreads;
    constexpr bool kPaired = S::kHalves == 2;
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const bool with_output = call.grad_output.data != nullptr;
    char* const key = shared_memory();
    char* const value = key + kTile;
    char* const reference = value + kTile;
    char* const outputs = reference + kTile;
    char* const slots = outputs + S::kTile;
    char* const map = slots + kSlots * S::kTile;  // A_t, then dS_t
    char* const exchange = map + kRows * kMapStride;
    float* const bias = reinterpret_cast<float*>(exchange + S::kExchange);
    float* const pull = bias + kKeys;  // 2 g w / H
    const int begin = a.cut.begin(), end = a.cut.end(call);
    const RowCopies<D, E, kRows, kThreads> queries(call.query, b, h);
    const RowCopies<D, E, kRows, kThreads> grad_outputs(call.grad_output, b, h);
    queries.start(begin, end, shared_address(slots));
    if (with_output) grad_outputs.start(begin, end, shared_address(outputs));
    commit_copies();
    load_streams<D, kThreads, E>(call, b, h, key, with_output ? value : nullptr,
                                 kReference ? reference : nullptr, [&] {
                                     load_bias(call, b, bias);
                                     if (kReference) load_pull(call, b, pull);
                                 });

    let_next_start();
    const int warp = int(threadIdx.x) / 32, own = 16 * (warp / S::kHalves);
    const int first_key = 8 * S::kEights * (warp % S::kHalves);
    const uint32_t scores = score_offset<D>() + uint32_t(first_key * kStride);
    const uint32_t key_at = shared_address(key), map_at = shared_address(map);
    const int lane_row = (own + lane() / 4) * kStride;
    char* const own_map = map + own * kMapStride + 2 * first_key;
    const Bias own_bias{bias + first_key, hides_only_last(call)};
    const WarpPair pair(exchange);
    const float2 scales = make_float2(call.scale, call.scale);
    const Rows grad_query = Rows::of<E>(call.grad_query, b, h);
    KeySums<D, S::kWarps> key_sums, value_sums;
    int slot = 0;
    for (int first = begin; first < end; first += kRows) {
        char* const tile = slots + slot * S::kTile;
        const bool more = first + kRows < end;
        const int first_row = first + own;
        wait_copies<0>();
        // All copies are there, and all warps are done with the map and with the other slot.
        __syncthreads();
        if constexpr (kSlots == 2) {
            slot = 1 - slot;
            if (more) queries.start(first + kRows, end, shared_address(slots + slot * S::kTile));
            commit_copies();
        }
        uint32_t rows[D / 8][2];
        const auto load = [&](const char* from) {
            load_row<D>(from + lane_row, 0, rows);
            load_row<D>(from + lane_row + 8 * kStride, 1, rows);
            settle(rows);
        };
        const auto normalise = [&](auto&... softmaxes) {
            if constexpr (kPaired) {
                pair.normalise(a.cut.scale_log2, softmaxes...);
            } else {
                tensor::normalise(a.cut.scale_log2, softmaxes...);
            }
        };
        float target[S::kEights][4], slope[S::kEights][4], means[2];
        Softmax of_target(target), of_slope(slope);
        load(tile);
        score_keys<D, E>(rows, key_at + scores, own_bias, target);
        if constexpr (kReference) {
            score_keys<D, E>(rows, shared_address(reference) + scores, own_bias, slope);
            normalise(of_target, of_slope);
            pull_to_reference(target, pull + first_key, slope);
        } else {
            normalise(of_target);
            clear(slope);
        }
        if (with_output) {
            share_map<E>(target, own_map);
            load(outputs);
            multiply_keys<D, E>(rows, shared_address(value) + scores, slope);
        }
        add_maps(a, b, first_row, end, first_key, slope);
        row_means(target, slope, means);
        if constexpr (kPaired) pair.put(means);
        // A_t and the means are there.
        __syncthreads();
        if (with_output) value_sums.template add<E, kRows>(map_at, shared_address(outputs));
        if constexpr (kPaired) pair.add(means);
        through_softmax(target, means, slope);
        // All warps are done with A_t and with the output gradients.
        __syncthreads();
        if (with_output && more) {
            grad_outputs.start(first + kRows, end, shared_address(outputs));
            commit_copies();
        }
        share_map<E>(slope, own_map);
        __syncthreads();
        if (call.grad_query.data) {
            const uint32_t sums = shared_address(key) + sum_offset<D>();
            if constexpr (kPaired) {
                write_half<D, E>(scales, grad_query, first_row, end,
                                 map_at + uint32_t(own * kMapStride), sums);
            } else {
                uint32_t packed[kKeySteps][4];
                pack_weights<E>(slope, packed);
                write_sums<D, 0, E>(scales, grad_query, first_row, end, Weighed{packed, sums});
            }
        }
        key_sums.template add<E, kRows>(map_at, shared_address(tile));
        if (kSlots == 1 && more) {
            __syncthreads();
            queries.start(first + kRows, end, shared_address(slots));
            commit_copies();
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
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(backward_kernel<D, E, kReference, kSlots>, grid, Shape<D, kSlots>::kThreads,
                 Shape<D, kSlots>::kBytes, stream, a);
}

template <int D, class E, bool kReference>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    if constexpr (D == 80) {
        if (small<D>()) return run<D, E, kReference, 1>(a, stream);
    }
    return run<D, E, kReference, 2>(a, stream);
}

template <int D, class E>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    return a.with_reference ? run<D, E, true>(a, stream) : run<D, E, false>(a, stream);
}

template <int D>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    return a.call.dtype == DType::float16 ? run<D, Half>(a, stream) : run<D, BFloat16>(a, stream);
}

template <int D>
int blocks() {
    if constexpr (D == 80) {
        if (small<D>()) return fitting<Shape<D, 1>>();
    }
    return std::max(fitting<Shape<D, 2>>(), 1);
}

}  // namespace

bool in_one_pass(const BackwardCall& call) {
    if (!call.grad_key.data || (call.reference_grad && call.with_reference())) return false;
    return call.head_dim <= 80 || fitting<Shape<160, 2>>() > 0;
}

int backward_blocks(int64_t head_dim) {
    return for_width(head_dim, [](auto width) { return blocks<decltype(width)::value>(); });
}

cudaError_t backward(const BackwardArguments& a, cudaStream_t stream) {
    return for_width(a.call.head_dim,
                     [&](auto width) { return run<decltype(width)::value>(a, stream); });
}

}  // namespace sefi::cuda::tensor
