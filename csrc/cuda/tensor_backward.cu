// Backward kernel for the matrix units in one pass: dQ, and partial sums of dK_t and dV_t.
//
// A warp first has 16 query rows, whose maps, computed once, give dQ. Then it has 16 keys: all rows'
// maps of these come to it through shared memory, as left factors of the sums over the rows.
#include <algorithm>

#include "cuda/key_tile.h"
#include "cuda/kernels.h"
#include "cuda/row_copies.h"
#include "cuda/slopes.h"
#include "cuda/start.h"
#include "cuda/tensor.h"

namespace sefi::cuda::tensor {
namespace {

constexpr int kWarps = 4, kRows = 16 * kWarps, kThreads = 32 * kWarps;
static_assert(kRows == kBlockRows);
// Bytes from row to row of a map: an odd number of 16-byte chunks, as in Layout.
constexpr int kMapStride = 16 * (kKeyEights | 1), kMap = kRows * kMapStride;

// Each warp sums one of the first four tiles of 16 keys, and a share of the columns of the fifth.
// kSlots: tiles of query rows in shared memory, two where the next one is on its way.
template <int D, int kSlots>
struct Shape {
    static constexpr int kEights = Layout<D>::kEights;
    static constexpr int kShare = (kEights + kWarps - 1) / kWarps;
    static constexpr int kTile = kRows * Layout<D>::kStride;
    static constexpr int kBytes =
        3 * Layout<D>::kTile + (1 + kSlots) * kTile + kMap + 4 * 2 * kKeys;
};

constexpr int kBlocks = 2;  // a multiprocessor, by their registers

// How many blocks of so many bytes each the shared memory of a multiprocessor holds, at most kBlocks.
int fitting(int bytes) {
    constexpr int kReserved = 1024;  // by the driver, for each block
    int device = 0, all = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return kBlocks;
    constexpr cudaDeviceAttr kAll = cudaDevAttrMaxSharedMemoryPerMultiprocessor;
    if (cudaDeviceGetAttribute(&all, kAll, device) != cudaSuccess) return kBlocks;
    return std::min(all / (bytes + kReserved), kBlocks);
}

// Whether one slot lets one block more on a multiprocessor: at 80 columns on 8.0.
template <int D>
bool small() {
    if constexpr (D < 80) return false;
    return fitting(Shape<D, 1>::kBytes) > fitting(Shape<D, 2>::kBytes);
}

// A warp's 16 rows of a map, to where all warps read it.
SEFI_DEVICE void share_map(const uint32_t (&weights)[kKeySteps][4], char* rows) {
    char* const to = rows + lane() / 4 * kMapStride + lane() % 4 * 4;
#pragma unroll
    for (int k = 0; k < kKeySteps; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = i % 2 * 8 * kMapStride + 32 * k + i / 2 * 16;
            *reinterpret_cast<uint32_t*>(to + at) = weights[k][i];
        }
    }
}

// What a map's rows add to the sums of a warp's keys and of its share, from `share` columns on.
// `map`, `rows`: addresses in shared memory of the map and of the tile of rows.
template <int D, class E, int kEights, int kShare>
SEFI_DEVICE void add_tile(uint32_t map, uint32_t rows, int share, float (&sums)[kEights][4],
                          float (&shared)[kShare][4]) {
    const uint32_t keys = map + uint32_t((lane() / 16 * 8 + lane() % 8) * kMapStride) +
                          uint32_t(lane() / 8 % 2 * 16);
    const int warp = int(threadIdx.x) / 32;
#pragma unroll
    for (int chunk = 0; chunk < kRows / 16; ++chunk) {
        const uint32_t from = keys + uint32_t(16 * chunk * kMapStride);
        const uint32_t at = rows + sum_offset<D>() + uint32_t(16 * chunk * Layout<D>::kStride);
        uint32_t factor[4];
        load_transposed(factor, from + uint32_t(32 * warp));
        add_rows<D, E>(sums, factor, at);
        load_transposed(factor, from + uint32_t(32 * kWarps));
        add_rows<D, E>(shared, factor, at + uint32_t(2 * share));
    }
}

template <int D, class E, bool kReference, int kSlots>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_kernel(const BackwardArguments a) {
    using S = Shape<D, kSlots>;
    constexpr int kTile = Layout<D>::kTile, kStride = Layout<D>::kStride;
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
    float* const bias = reinterpret_cast<float*>(map + kMap);
    float* const pull = bias + kKeys;  // 2 g w / H
    const int64_t begin = blockIdx.y * a.cut.rows_a_block;
    const int64_t end = min(begin + a.cut.rows_a_block, call.queries);
    const RowCopies<D, E, kRows, kThreads> queries(call.query, b, h);
    const RowCopies<D, E, kRows, kThreads> grad_outputs(call.grad_output, b, h);
    queries.start(begin, end, shared_address(slots));
    if (with_output) grad_outputs.start(begin, end, shared_address(outputs));
    commit_copies();
    load_bias<kThreads>(call, b, bias);
    if (kReference) {
        load_weights<kThreads>(call, b, 2.0f * call.grad_alignment[b] / float(heads), pull);
    }
    __syncthreads();
    load_streams<D, kThreads, E>(call, b, h, bias, key, with_output ? value : nullptr,
                                 kReference ? reference : nullptr);

    const int warp = int(threadIdx.x) / 32;
    const uint32_t key_at = shared_address(key), map_at = shared_address(map);
    // The last shares overlap where the columns are no multiple of them.
    const int share = 8 * min(warp * S::kShare, S::kEights - S::kShare);
    char* const own_map = map + 16 * warp * kMapStride;
    const int own_row = (16 * warp + lane() / 4) * kStride;
    E* const grad_query = head_of<E>(call.grad_query, b, h);
    float key_sums[S::kEights][4] = {}, value_sums[S::kEights][4] = {};
    float key_share[S::kShare][4] = {}, value_share[S::kShare][4] = {};
    int slot = 0;
    for (int64_t first = begin; first < end; first += kRows) {
        char* const tile = slots + slot * S::kTile;
        const bool more = first + kRows < end;
        wait_copies<0>();
        // All copies are there, and all warps are done with the map and with the other slot.
        __syncthreads();
        if constexpr (kSlots == 2) {
            slot = 1 - slot;
            if (more) queries.start(first + kRows, end, shared_address(slots + slot * S::kTile));
            commit_copies();
        }
        uint32_t rows[D / 8][2], packed[kKeySteps][4];
        float target[kKeyEights][4], slope[kKeyEights][4], means[2];
        load_row<D>(tile + own_row, 0, rows);
        load_row<D>(tile + own_row + 8 * kStride, 1, rows);
        Softmax of_target(target), of_slope(slope);
        score_keys<D, E>(rows, key_at + score_offset<D>(), bias, target);
        if constexpr (kReference) {
            score_keys<D, E>(rows, shared_address(reference) + score_offset<D>(), bias, slope);
            normalise(a.cut.scale_log2, of_target, of_slope);
            pull_to_reference(target, pull, slope);
        } else {
            normalise(a.cut.scale_log2, of_target);
            clear(slope);
        }
        if (with_output) {
            pack_weights<E>(target, packed);
            share_map(packed, own_map);
            load_row<D>(outputs + own_row, 0, rows);
            load_row<D>(outputs + own_row + 8 * kStride, 1, rows);
            multiply_keys<D, E>(rows, shared_address(value) + score_offset<D>(), slope);
            __syncthreads();
            add_tile<D, E>(map_at, shared_address(outputs), share, value_sums, value_share);
        }
        add_maps(a, b, first + 16 * warp, end, slope);
        row_means(target, slope, means);
        through_softmax(target, means, slope);
        pack_weights<E>(slope, packed);
        // All warps are done with A_t and with the output gradients.
        __syncthreads();
        if (with_output && more) {
            grad_outputs.start(first + kRows, end, shared_address(outputs));
            commit_copies();
        }
        share_map(packed, own_map);
        if (call.grad_query.data) {
            write_sums<D, 0>(call.scale, grad_query, call.grad_query.row, first + 16 * warp, end,
                             Weighed{packed, key_at + sum_offset<D>()});
        }
        __syncthreads();
        add_tile<D, E>(map_at, shared_address(tile), share, key_sums, key_share);
        if (kSlots == 1 && more) {
            __syncthreads();
            queries.start(first + kRows, end, shared_address(slots));
            commit_copies();
        }
    }
    const int64_t entry = (blockIdx.x * a.cut.splits + blockIdx.y) * call.keys * D;
    const auto store = [&](float* to, float factor, const auto& sums, const auto& shared) {
        if (!to) return;
        store_sums<D>(sums, factor, call.keys, warp, to + entry);
        store_sums<D>(shared, factor, call.keys, kWarps, to + entry + share);
    };
    store(a.key, call.scale, key_sums, key_share);
    store(a.value, 1.0f, value_sums, value_share);
}

template <int D, class E, bool kReference, int kSlots>
cudaError_t run(const BackwardArguments& a, cudaStream_t stream) {
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.cut.splits));
    return start(backward_kernel<D, E, kReference, kSlots>, grid, kThreads,
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
    return std::max(fitting(small<D>() ? Shape<D, 1>::kBytes : Shape<D, 2>::kBytes), 1);
}

}  // namespace

bool in_one_pass(const BackwardCall& call) {
    return call.head_dim <= 80 && call.grad_key.data &&
           !(call.reference_grad && call.with_reference());
}

int backward_blocks(int64_t head_dim) {
    return head_dim == 40 ? blocks<40>() : head_dim == 64 ? blocks<64>() : blocks<80>();
}

cudaError_t backward(const BackwardArguments& a, cudaStream_t stream) {
    switch (a.call.head_dim) {
        case 40:
            return run<40>(a, stream);
        case 64:
            return run<64>(a, stream);
        default:
            return run<80>(a, stream);
    }
}

}  // namespace sefi::cuda::tensor
