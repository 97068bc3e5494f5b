// Backward kernel for tensor cores: dK_t, dV_t and dK_r, or partial sums of them.
//
// The rows of the products are keys, 16 per warp. The probabilities, recomputed with query rows as
// columns, are then in registers as left factors of the sums over those rows.
#include "cuda/kv_accumulate.h"
#include "cuda/launch.h"
#include "cuda/load_kv.h"

namespace sefi::cuda::mma {
namespace {

// Left factors of the 16 keys of a warp. kResident: kept in registers for the whole loop.
template <int D, class E, bool kResident>
struct KeyTile {
    static constexpr int kSteps = (D + 15) / 16;
    uint32_t fragments[kResident ? kSteps : 1][4];
    uint32_t address = 0;

    // Hidden and missing keys become zeros. Before the caller reads a tile in shared memory, it
    // waits for its copies and at a barrier.
    template <int kThreads>
    SEFI_DEVICE void load(const View& view, int64_t b, int64_t h, const float* bias, int tile,
                          char* shared) {
        const E* const head = head_of<E>(view, b, h);
        constexpr int kN8 = Layout<D>::kN8, kStride = Layout<D>::kStride;
        if constexpr (kResident) {
#pragma unroll
            for (int i = 0; i < 2 * kN8; ++i) {
                const int key = 16 * tile + lane() / 4 + 8 * (i % 2);
                const E* const from = head + key * view.row + i / 2 * 8 + 2 * (lane() % 4);
                const bool visible = bias[key] == 0.0f;
                fragments[i / 4][i % 4] = visible ? *reinterpret_cast<const uint32_t*>(from) : 0;
            }
        } else {
            const uint32_t to = shared_address(shared);
            for (int i = int(threadIdx.x); i < kKeys * kN8; i += kThreads) {
                const int key = i / kN8, n8 = i % kN8;
                const bool visible = bias[key] == 0.0f;
                cp_async(to + uint32_t(key * kStride + 16 * n8),
                         head + (visible ? key : 0) * view.row + 8 * n8, visible);
            }
            address = to + uint32_t(16 * tile * kStride) + sum_offset<D>();
        }
    }

    SEFI_DEVICE void get(int step, uint32_t (&a)[4]) const {
        if constexpr (kResident) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fragments[step][i];
        } else {
            ldmatrix(a, address + uint32_t(32 * step));
        }
    }

    // The last n8 of an odd number of n8.
    SEFI_DEVICE void get_half(int step, uint32_t (&a)[2]) const {
        if constexpr (kResident) {
            a[0] = fragments[step][0];
            a[1] = fragments[step][1];
        } else {
            ldmatrix(a, address + uint32_t(32 * step));
        }
    }
};

// Bias and loss factor of the keys g and g + 8 of a lane.
struct KeyConstants {
    float bias[2], loss_factor[2];

    SEFI_DEVICE KeyConstants(const float* all_bias, const float* all_factors, int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = 16 * tile + lane() / 4 + 8 * i;
            bias[i] = all_bias[key];
            loss_factor[i] = all_factors[key];
        }
    }
};

// products += keys * rows^T: 16 keys by 16 rows, for one or two tiles of keys. `rows` is an address
// with score_offset.
template <int D, class E, class... Tiles>
SEFI_DEVICE void multiply_rows(uint32_t rows, Tiles&&... tiles) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t b[4];
        ldmatrix(b, rows + uint32_t(32 * step));
        const auto one = [&](const auto& tile) {
            uint32_t a[4];
            tile.keys.get(step, a);
            mma_sync<E>(tile.products[0], a, b[0], b[1]);
            mma_sync<E>(tile.products[1], a, b[2], b[3]);
        };
        (one(tiles), ...);
    }
    if constexpr (D % 16 == 8) {
        uint32_t b[2];
        const uint32_t lanes = uint32_t(lane() % 16 * Layout<D>::kStride);
        ldmatrix(b, rows - score_offset<D>() + lanes + uint32_t(2 * D - 16));
        const auto one = [&](const auto& tile) {
            uint32_t a[2];
            tile.keys.get_half(D / 16, a);
            mma_sync<E>(tile.products[0], a, b[0]);
            mma_sync<E>(tile.products[1], a, b[1]);
        };
        (one(tiles), ...);
    }
}

template <class Tile>
struct Factor {
    const Tile& keys;
    float (&products)[2][4];
};
template <class Tile>
Factor(const Tile&, float (&)[2][4]) -> Factor<Tile>;

// sums += weights * rows for the 16 keys of a warp, 16 rows and its columns. `rows` is an address
// with sum_offset.
template <int D, class E, int kN8>
SEFI_DEVICE void add_rows(float (&sums)[kN8][4], const uint32_t (&weights)[4], uint32_t rows) {
#pragma unroll
    for (int e = 0; e + 2 <= kN8; e += 2) {
        uint32_t b[4];
        ldmatrix_trans(b, rows + uint32_t(16 * e));
        mma_sync<E>(sums[e], weights, b[0], b[1]);
        mma_sync<E>(sums[e + 1], weights, b[2], b[3]);
    }
    if constexpr (kN8 % 2) {
        uint32_t b[2];
        ldmatrix_trans(b, rows + uint32_t(16 * (kN8 - 1)));
        mma_sync<E>(sums[kN8 - 1], weights, b[0], b[1]);
    }
}

// Add the gradients of chosen columns for 16 keys and the 16 rows from `first` on.
SEFI_DEVICE void add_probs_grads(const BwdParams& a, int64_t first, int tile,
                                 float (&d_probs)[2][4]) {
    const int64_t b = blockIdx.x / unsigned(a.call.heads);
    const int64_t probs_head = a.call.probs_all_heads ? int64_t(blockIdx.x) : b;
    for (int64_t t = 0; t < a.call.probs_count; ++t) {
        const int64_t place =
            a.call.probs_positions[b * a.call.probs_positions_batch + t] - 16 * tile;
        const float* const gradient =
            a.call.grad_attn_probs + (probs_head * a.call.probs_count + t) * a.call.queries;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t row = first + 8 * (i / 4) + 2 * (lane() % 4) + i % 2;
            if (place == lane() / 4 + 8 * (i % 4 / 2) && row < a.call.queries) {
                d_probs[i / 4][i % 4] += a.probs_grad_share * gradient[row];
            }
        }
    }
}

// Compute the weights of 16 rows in the sums of 16 keys, packed as left factors: dS_t for query
// rows and A_t for rows of dO, or only dS_r. `rows` is the address of a stage, `stats` its row
// statistics, and `chunk` selects 16 of its rows.
template <int D, class E, int kRows, int kGrads, class Tile>
SEFI_DEVICE void key_weights(const BwdParams& a, const Tile& key, const Tile& value,
                             const Tile& reference, const KeyConstants& constants, uint32_t rows,
                             const float* stats, int chunk, int64_t first, int tile,
                             uint32_t (&weights)[kGrads][4]) {
    constexpr bool kReferenceOnly = kGrads == 1;
    const uint32_t at = rows + uint32_t(16 * chunk * Layout<D>::kStride) + score_offset<D>();
    float probs[2][4], d_probs[2][4] = {}, ref_probs[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        probs[i / 4][i % 4] = ref_probs[i / 4][i % 4] = constants.bias[i % 4 / 2];
    }
    if (a.with_reference) {
        multiply_rows<D, E>(at, Factor{key, probs}, Factor{reference, ref_probs});
    } else {
        multiply_rows<D, E>(at, Factor{key, probs});
    }
    if (!kReferenceOnly && a.call.grad_output.data) {
        const uint32_t below = uint32_t(kRows * Layout<D>::kStride);
        multiply_rows<D, E>(at + below, Factor{value, d_probs});
    }
    if (!kReferenceOnly && a.call.grad_attn_probs) {
        add_probs_grads(a, first + 16 * chunk, tile, d_probs);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float* const at_row = stats + 16 * chunk + 8 * n + 2 * (lane() % 4);
        const auto pair = [&](int kind) {
            return *reinterpret_cast<const float2*>(at_row + kind * kRows);
        };
        const float2 lse = pair(0), delta = pair(1);
        const float2 ref_lse = pair(2), ref_delta = pair(3);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto own = [&](float2 both) { return i % 2 ? both.y : both.x; };
            const float scale = a.sm_scale_log2;
            const float p = exp2_approx(fmaf(probs[n][i], scale, -own(lse)));
            float dp = d_probs[n][i] - own(delta);
            if (a.with_reference) {
                const float ref = exp2_approx(fmaf(ref_probs[n][i], scale, -own(ref_lse)));
                const float d_probs_loss = constants.loss_factor[i / 2] * (p - ref);
                dp += d_probs_loss;
                ref_probs[n][i] = ref * (-d_probs_loss - own(ref_delta));
            }
            probs[n][i] = p;
            d_probs[n][i] = kReferenceOnly ? ref_probs[n][i] : p * dp;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = i / 2, from = i % 2 * 2;
        weights[0][i] = pack<E>(d_probs[n][from], d_probs[n][from + 1]);
        if (!kReferenceOnly) weights[kGrads - 1][i] = pack<E>(probs[n][from], probs[n][from + 1]);
    }
}

// kReference: dK_r, else dK_t and dV_t, because registers do not hold the sums of three gradients.
// kParts: number of warps per tile of keys. With two, each computes the weights of half the rows,
// exchanges them through shared memory, and sums half the columns. kSmall: one stage of 16 rows,
// for wide heads on devices with 99 KiB of shared memory per block.
template <int D, bool kReference, bool kSmall>
struct Shape {
    static constexpr int kParts = D > 80 ? 2 : 1;
    static constexpr int kWarps = kKeySteps * kParts, kThreads = 32 * kWarps;
    static constexpr int kRows = kSmall ? 16 : D > 64 ? 32 : 64;
    static constexpr int kChunks = kRows / 16, kStages = kSmall ? 1 : 2;
    static constexpr bool kResident = D == 40;
    static constexpr int kN8 = Layout<D>::kN8 / kParts;  // of the columns that a warp sums
    static constexpr int kTile = kRows * Layout<D>::kStride;
    static constexpr int kStage = 2 * kTile + 4 * 4 * kRows;
    static constexpr int kGrads = kReference ? 1 : 2;
    static constexpr int kExchange = kParts == 1 ? 0 : kGrads * kKeySteps * kChunks * 512;
    static constexpr int kKeyTiles = kResident ? 0 : 3 * Layout<D>::kTile;
    static constexpr int kBytes = kStages * kStage + kKeyTiles + kExchange + 4 * 2 * kKeys;
    static constexpr int kCtasPerSm = D > 80 ? 1 : 2;
};

// Copy a tile of rows and their row statistics to shared memory.
template <int D, int kRows, int kThreads, class E>
SEFI_DEVICE void load_stage(const BwdParams& a, const RowCopies<D, E, kRows, kThreads>& queries,
                            const RowCopies<D, E, kRows, kThreads>& grad_outputs,
                            bool with_grad_output, const float* row_stats, int first,
                            uint32_t stage) {
    constexpr int kTile = kRows * Layout<D>::kStride;
    const int end = int(a.call.queries);
    queries.copy(first, end, stage);
    if (with_grad_output) grad_outputs.copy(first, end, stage + uint32_t(kTile));
    for (int i = int(threadIdx.x); i < kRows; i += kThreads) {
        constexpr int kChunks = kRows / 4;
        // lse and delta of A_t, then of A_r. Statistics that were never written are not used.
        const int kind = i / kChunks, chunk = i % kChunks;
        const int place = kind / 2 * kRefStats + (kind % 2 ? kDelta : kLse);
        const float* from = row_stats + place * a.padded_rows + first + 4 * chunk;
        cp_async(stage + uint32_t(2 * kTile + 4 * (kind * kRows + 4 * chunk)), from, true);
    }
    cp_async_commit();
}

template <int D, class E, bool kReference, bool kSmall>
__global__ void __launch_bounds__(Shape<D, kReference, kSmall>::kThreads,
                                  Shape<D, kReference, kSmall>::kCtasPerSm)
    attn_bwd_dkdv_kernel(const BwdParams a) {
    using S = Shape<D, kReference, kSmall>;
    constexpr int kStride = Layout<D>::kStride, kThreads = S::kThreads;
    const BackwardCall& call = a.call;
    const unsigned heads = unsigned(call.heads);
    const int64_t b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int warp = int(threadIdx.x) / 32, tile = warp % kKeySteps, part = warp / kKeySteps;
    const bool with_grad_output = !kReference && call.grad_output.data != nullptr;
    char* const stages = shared_memory();
    char* const keys = stages + S::kStages * S::kStage;
    char* const exchange = keys + S::kKeyTiles;
    float* const bias = reinterpret_cast<float*>(exchange + S::kExchange);
    float* const loss_factor = bias + kKeys;  // 2 g w / H
    load_bias(call, b, bias);
    if (a.with_reference) load_loss_factor(call, b, loss_factor);
    __syncthreads();

    const RowCopies<D, E, S::kRows, kThreads> queries(call.query, b, h);
    const RowCopies<D, E, S::kRows, kThreads> grad_outputs(call.grad_output, b, h);
    const float* const row_stats = a.row_stats + blockIdx.x * kRowStats * a.padded_rows;
    KeyTile<D, E, S::kResident> key, value, reference;
    key.template load<kThreads>(call.key, b, h, bias, tile, keys);
    if (with_grad_output) {
        value.template load<kThreads>(call.value, b, h, bias, tile, keys + Layout<D>::kTile);
    }
    if (a.with_reference) {
        reference.template load<kThreads>(call.reference_key, b, h, bias, tile,
                                          keys + 2 * Layout<D>::kTile);
    }
    const KeyConstants constants(bias, loss_factor, tile);
    // dK_t and dV_t, or dK_r.
    float sums[S::kGrads][S::kN8][4] = {};

    const int begin = a.split.begin(), end = a.split.end(call);
    const uint32_t stages_at = shared_address(stages);
    const auto load = [&](int from, uint32_t stage) {
        load_stage(a, queries, grad_outputs, with_grad_output, row_stats, from, stage);
    };
    load(begin, stages_at);
    for (int first = begin; first < end; first += S::kRows) {
        const int now = int((first - begin) / S::kRows % S::kStages);
        const char* const stage = stages + now * S::kStage;
        const uint32_t rows = stages_at + uint32_t(now * S::kStage);
        cp_async_wait<0>();
        // The copies have arrived, and all warps have finished with the other stage.
        __syncthreads();
        if (S::kStages == 2 && first + S::kRows < end) {
            load(first + S::kRows, stages_at + uint32_t((1 - now) * S::kStage));
        }
        const float* const stats = reinterpret_cast<const float*>(stage + 2 * S::kTile);
        const auto add = [&](int chunk, const uint32_t (&weights)[S::kGrads][4]) {
            const uint32_t at =
                rows + uint32_t(16 * chunk * kStride + 16 * part * S::kN8) + sum_offset<D>();
            add_rows<D, E>(sums[0], weights[0], at);
            if constexpr (!kReference) {
                if (with_grad_output) add_rows<D, E>(sums[1], weights[1], at + uint32_t(S::kTile));
            }
        };
        if constexpr (S::kParts == 1) {
#pragma unroll 1
            for (int chunk = 0; chunk < S::kChunks; ++chunk) {
                uint32_t weights[S::kGrads][4];
                key_weights<D, E, S::kRows>(a, key, value, reference, constants, rows, stats, chunk,
                                            first, tile, weights);
                add(chunk, weights);
            }
        } else {
            uint4* const shared_weights = reinterpret_cast<uint4*>(exchange) + lane();
            const auto place = [&](int chunk, int grad) {
                return shared_weights + 32 * ((tile * S::kChunks + chunk) * S::kGrads + grad);
            };
#pragma unroll 1
            for (int chunk = part; chunk < S::kChunks; chunk += S::kParts) {
                uint32_t weights[S::kGrads][4];
                // Reloaded in each iteration, because wide sums leave no registers for them.
                const KeyConstants reloaded(bias, loss_factor, tile);
                key_weights<D, E, S::kRows>(a, key, value, reference, reloaded, rows, stats, chunk,
                                            first, tile, weights);
                for (int g = 0; g < S::kGrads; ++g) {
                    *place(chunk, g) =
                        make_uint4(weights[g][0], weights[g][1], weights[g][2], weights[g][3]);
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int chunk = 0; chunk < S::kChunks; ++chunk) {
                uint32_t weights[S::kGrads][4];
                for (int g = 0; g < S::kGrads; ++g) {
                    const uint4 four = *place(chunk, g);
                    weights[g][0] = four.x;
                    weights[g][1] = four.y;
                    weights[g][2] = four.z;
                    weights[g][3] = four.w;
                }
                add(chunk, weights);
            }
        }
        if (S::kStages == 1 && first + S::kRows < end) {
            __syncthreads();
            load(first + S::kRows, stages_at);
        }
    }
    const auto store = [&](int which, float factor, float* partials, const View& gradient) {
        store_gradient<D, E>(a, partials, gradient, [&](auto* to, int64_t row) {
            store_sums(sums[which], factor, call.keys, tile, to + 8 * part * S::kN8, row);
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
cudaError_t run(const BwdParams& a, cudaStream_t stream) {
    using S = Shape<D, kReference, kSmall>;
    if constexpr (D > 80 && !kSmall) {
        int device = 0, limit = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error != cudaSuccess) return error;
        error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (error != cudaSuccess) return error;
        if (limit < S::kBytes) return run<D, E, kReference, true>(a, stream);
    }
    const dim3 grid(unsigned(a.call.batch * a.call.heads), unsigned(a.split.num_splits));
    return launch(attn_bwd_dkdv_kernel<D, E, kReference, kSmall>, grid, S::kThreads, S::kBytes,
                  stream, a);
}

}  // namespace

cudaError_t attn_bwd_dkdv(const BwdParams& a, cudaStream_t stream) {
    const BackwardCall& call = a.call;
    const auto launch_for = [&](bool of_reference) {
        return for_kernel(call, of_reference, [&](auto dim, auto element, auto reference) {
            return run<decltype(dim)::value, decltype(element), decltype(reference)::value>(a,
                                                                                            stream);
        });
    };
    cudaError_t error = cudaSuccess;
    if (call.grad_key.data || call.grad_value.data) error = launch_for(false);
    if (call.grad_reference_key.data && error == cudaSuccess) error = launch_for(true);
    return error;
}

}  // namespace sefi::cuda::mma
