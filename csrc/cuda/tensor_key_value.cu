// Backward kernel of the keys for the matrix units: dK_t, dV_t and dK_r, or partial sums of them.
//
// Keys are the rows of the products here: a warp has 16 of them, and its maps, computed anew as
// columns of query rows, are at once the left factor of the sums over those rows.
#include "cuda/kernels.h"
#include "cuda/key_sums.h"
#include "cuda/key_tile.h"
#include "cuda/row_copies.h"
#include "cuda/start.h"
#include "cuda/streams.h"
#include "cuda/tensor.h"

namespace sefi::cuda::tensor {
namespace {

// kReference: dK_r alone, else dK_t and dV_t; registers hold two gradients' sums and not three.
// Wide heads are shared by two warps a tile of keys: each computes the maps of half the rows, hands
// them over through shared memory, and sums half the columns. kSmall: one stage of 16 rows, with
// half the warps idle at times, for wide heads on devices with 99 KiB of shared memory a block.
template <int D, bool kReference, bool kSmall>
struct Shape {
    static constexpr int kParts = D > 80 ? 2 : 1;
    static constexpr int kWarps = kKeySteps * kParts, kThreads = 32 * kWarps;
    static constexpr int kRows = kSmall ? 16 : D > 64 ? 32 : 64;
    static constexpr int kChunks = kRows / 16, kStages = kSmall ? 1 : 2;
    static constexpr bool kResident = D == 40;
    static constexpr int kEights = Layout<D>::kEights / kParts;  // that one warp sums
    static constexpr int kTile = kRows * Layout<D>::kStride;
    static constexpr int kStage = 2 * kTile + 4 * 4 * kRows;
    static constexpr int kMaps = kReference ? 1 : 2;
    static constexpr int kExchange = kParts == 1 ? 0 : kMaps * kKeySteps * kChunks * 512;
    static constexpr int kKeyTiles = kResident ? 0 : 3 * Layout<D>::kTile;
    static constexpr int kBytes = kStages * kStage + kKeyTiles + kExchange + 4 * 2 * kKeys;
    static constexpr int kBlocks = D > 80 ? 1 : 2;  // a multiprocessor
};

// One tile of rows, and four numbers of each, on their way to shared memory.
template <int D, int kRows, int kThreads, class E>
SEFI_DEVICE void load_stage(const BackwardArguments& a,
                            const RowCopies<D, E, kRows, kThreads>& queries,
                            const RowCopies<D, E, kRows, kThreads>& grad_outputs,
                            bool with_output, const float* statistics, int first,
                            uint32_t stage) {
    constexpr int kTile = kRows * Layout<D>::kStride;
    const int end = int(a.call.queries);
    queries.start(first, end, stage);
    if (with_output) grad_outputs.start(first, end, stage + uint32_t(kTile));
    for (int i = int(threadIdx.x); i < kRows; i += kThreads) {
        constexpr int kChunks = kRows / 4;
        // A_t's log_sum and mean, then A_r's. What was not written is not used, whatever it is.
        const int kind = i / kChunks, chunk = i % kChunks;
        const int place = kind / 2 * kAnchor + (kind % 2 ? kMean : kLogSum);
        const float* from = statistics + place * a.padded_rows + first + 4 * chunk;
        copy_async(stage + uint32_t(2 * kTile + 4 * (kind * kRows + 4 * chunk)), from,
                   true);
    }
    commit_copies();
}

template <int D, class E, bool kReference, bool kSmall>
__global__ void __launch_bounds__(Shape<D, kReference, kSmall>::kThreads,
                                  Shape<D, kReference, kSmall>::kBlocks)
    key_value_kernel(const BackwardArguments a) {
    using S = Shape<D, kReference, kSmall>;
    constexpr int kStride = Layout<D>::kStride, kThreads = S::kThreads;
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int warp = int(threadIdx.x) / 32, tile = warp % kKeySteps, part = warp / kKeySteps;
    const bool with_output = !kReference && call.grad_output.data != nullptr;
    char* const stages = shared_memory();
    char* const keys = stages + S::kStages * S::kStage;
    char* const exchange = keys + S::kKeyTiles;
    float* const bias = reinterpret_cast<float*>(exchange + S::kExchange);
    float* const pull = bias + kKeys;  // 2 g w / H
    load_bias(call, b, bias);
    if (a.with_reference) load_pull(call, b, pull);
    __syncthreads();

    const RowCopies<D, E, S::kRows, kThreads> queries(call.query, b, h);
    const RowCopies<D, E, S::kRows, kThreads> grad_outputs(call.grad_output, b, h);
    const float* const statistics = a.statistics + blockIdx.x * kStatistics * a.padded_rows;
    KeyTile<D, E, S::kResident> key, value, reference;
    key.template load<kThreads>(call.key, b, h, bias, tile, keys);
    if (with_output) {
        value.template load<kThreads>(call.value, b, h, bias, tile, keys + Layout<D>::kTile);
    }
    if (a.with_reference) {
        reference.template load<kThreads>(call.reference_key, b, h, bias, tile,
                                          keys + 2 * Layout<D>::kTile);
    }
    const KeyNumbers numbers(bias, pull, tile);
    // Of dK_t and dV_t, or of dK_r alone.
    float sums[S::kMaps][S::kEights][4] = {};

    const int begin = a.cut.begin(), end = a.cut.end(call);
    const uint32_t stages_at = shared_address(stages);
    const auto load = [&](int from, uint32_t stage) {
        load_stage(a, queries, grad_outputs, with_output, statistics, from, stage);
    };
    load(begin, stages_at);
    for (int first = begin; first < end; first += S::kRows) {
        const int now = int((first - begin) / S::kRows % S::kStages);
        const char* const stage = stages + now * S::kStage;
        const uint32_t rows = stages_at + uint32_t(now * S::kStage);
        wait_copies<0>();
        // All copies are there, and all warps have left the other stage.
        __syncthreads();
        if (S::kStages == 2 && first + S::kRows < end) {
            load(first + S::kRows, stages_at + uint32_t((1 - now) * S::kStage));
        }
        const float* const of_rows = reinterpret_cast<const float*>(stage + 2 * S::kTile);
        const auto add = [&](int chunk, const uint32_t(&attn_probs)[S::kMaps][4]) {
            const uint32_t at = rows + uint32_t(16 * chunk * kStride + 16 * part * S::kEights) +
                                sum_offset<D>();
            add_rows<D, E>(sums[0], attn_probs[0], at);
            if constexpr (!kReference) {
                if (with_output) add_rows<D, E>(sums[1], attn_probs[1], at + uint32_t(S::kTile));
            }
        };
        if constexpr (S::kParts == 1) {
#pragma unroll 1
            for (int chunk = 0; chunk < S::kChunks; ++chunk) {
                uint32_t attn_probs[S::kMaps][4];
                key_maps<D, E, S::kRows>(a, key, value, reference, numbers, rows, of_rows, chunk,
                                         first, tile, attn_probs);
                add(chunk, attn_probs);
            }
        } else {
            uint4* const shared_maps = reinterpret_cast<uint4*>(exchange) + lane();
            const auto place = [&](int chunk, int map) {
                return shared_maps + 32 * ((tile * S::kChunks + chunk) * S::kMaps + map);
            };
#pragma unroll 1
            for (int chunk = part; chunk < S::kChunks; chunk += S::kParts) {
                uint32_t attn_probs[S::kMaps][4];
                // Read anew in each turn: wide sums leave no register to keep them in.
                const KeyNumbers read_anew(bias, pull, tile);
                key_maps<D, E, S::kRows>(a, key, value, reference, read_anew, rows, of_rows, chunk,
                                         first, tile, attn_probs);
                for (int m = 0; m < S::kMaps; ++m) {
                    *place(chunk, m) = make_uint4(attn_probs[m][0], attn_probs[m][1], attn_probs[m][2], attn_probs[m][3]);
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int chunk = 0; chunk < S::kChunks; ++chunk) {
                uint32_t attn_probs[S::kMaps][4];
                for (int m = 0; m < S::kMaps; ++m) {
                    const uint4 four = *place(chunk, m);
                    attn_probs[m][0] = four.x;
                    attn_probs[m][1] = four.y;
                    attn_probs[m][2] = four.z;
                    attn_probs[m][3] = four.w;
                }
                add(chunk, attn_probs);
            }
        }
        if (S::kStages == 1 && first + S::kRows < end) {
            __syncthreads();
            load(first + S::kRows, stages_at);
        }
    }
    const auto store = [&](int which, float factor, float* partials, const View& gradient) {
        store_gradient<D, E>(a, partials, gradient, [&](auto* to, int64_t row) {
            store_sums(sums[which], factor, call.keys, tile, to + 8 * part * S::kEights, row);
        });
    };
    if constexpr (kReference) {
        store(0, call.scale, a.reference, call.grad_reference_key);
    } else {
        store(0, call.scale, a.key, call.grad_key);
        store(1, 1.0f, a.value, call.grad_value);
    }
}

template <int D, class E, bool kReference, bool kSmall = false>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    using S = Shape<D, kReference, kSmall>;
    if constexpr (D > 80 && !kSmall) {
        int device = 0, limit = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error != cudaSuccess) return error;
        error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error != cudaSuccess) return error;
        if (limit < S::kBytes) return run<D, E, kReference, true>(a, stream);
    }
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(key_value_kernel<D, E, kReference, kSmall>, grid, S::kThreads, S::kBytes, stream,
                 a);
}

template <int D, class E>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const BackwardCall& call = a.call;
    if (call.grad_key.data || call.grad_value.data) error = run<D, E, false>(a, stream);
    if (call.grad_reference_key.data && error == cudaSuccess) error = run<D, E, true>(a, stream);
    return error;
}

template <int D>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    return a.call.dtype == DType::float16 ? run<D, Half>(a, stream) : run<D, BFloat16>(a, stream);
}

}  // namespace

cudaError_t backward_key_value(const BackwardArguments& a, cudaStream_t stream) {
    return for_width(a.call.head_dim,
                     [&](auto width) { return run<decltype(width)::value>(a, stream); });
}

}  // namespace sefi::cuda::tensor
