// Pieces of the keys' kernel: 16 keys of a warp against 16 query rows at a time.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

// Left factors of a warp's 16 keys: in registers for the whole loop, or read again at each use.
template <int D, class E, bool kResident>
struct KeyTile {
    static constexpr int kSteps = (D + 15) / 16;
    uint32_t fragments[kResident ? kSteps : 1][4];
    uint32_t address = 0;

    // Hidden and missing keys become zeros. A tile in shared memory may be read after the caller
    // has waited for its copies and met the other warps.
    template <int kThreads>
    SEFI_DEVICE void load(const View& view, int64_t b, int64_t h, const float* bias, int tile,
                          char* shared) {
        const E* const head = head_of<E>(view, b, h);
        constexpr int kEights = Layout<D>::kEights, kStride = Layout<D>::kStride;
        if constexpr (kResident) {
#pragma unroll
            for (int i = 0; i < 2 * kEights; ++i) {
                const int key = 16 * tile + lane() / 4 + 8 * (i % 2);
                const E* const from = head + key * view.row + i / 2 * 8 + 2 * (lane() % 4);
                const bool visible = bias[key] == 0.0f;
                fragments[i / 4][i % 4] =
                    visible ? *reinterpret_cast<const uint32_t*>(from) : 0;
            }
        } else {
            const uint32_t to = shared_address(shared);
            for (int i = int(threadIdx.x); i < kKeys * kEights; i += kThreads) {
                const int key = i / kEights, eight = i % kEights;
                const bool visible = bias[key] == 0.0f;
                copy_async(to + uint32_t(key * kStride + 16 * eight),
                           head + (visible ? key : 0) * view.row + 8 * eight, visible);
            }
            address = to + uint32_t(16 * tile * kStride) + sum_offset<D>();
        }
    }

    SEFI_DEVICE void get(int step, uint32_t (&a)[4]) const {
        if constexpr (kResident) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fragments[step][i];
        } else {
            load_matrices(a, address + uint32_t(32 * step));
        }
    }

    // The last eight columns where there is no ninth.
    SEFI_DEVICE void get_half(int step, uint32_t (&a)[2]) const {
        if constexpr (kResident) {
            a[0] = fragments[step][0];
            a[1] = fragments[step][1];
        } else {
            load_matrices(a, address + uint32_t(32 * step));
        }
    }
};

// What a lane needs of its keys g and g + 8: 0 or -inf, and the subject loss's factor.
struct KeyNumbers {
    float bias[2], pull[2];

    SEFI_DEVICE KeyNumbers(const float* all_bias, const float* all_pull, int tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = 16 * tile + lane() / 4 + 8 * i;
            bias[i] = all_bias[key];
            pull[i] = all_pull[key];
        }
    }
};

// products += keys * rows^T: 16 keys by 16 rows, for one or two tiles of keys at once. `rows` is
// the rows' address with score_offset.
template <int D, class E, class... Tiles>
SEFI_DEVICE void multiply_rows(uint32_t rows, Tiles&&... tiles) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        uint32_t b[4];
        load_matrices(b, rows + uint32_t(32 * step));
        const auto one = [&](const auto& tile) {
            uint32_t a[4];
            tile.keys.get(step, a);
            multiply_add<E>(tile.products[0], a, b[0], b[1]);
            multiply_add<E>(tile.products[1], a, b[2], b[3]);
        };
        (one(tiles), ...);
    }
    if constexpr (D % 16 == 8) {
        uint32_t b[2];
        const uint32_t lanes = uint32_t(lane() % 16 * Layout<D>::kStride);
        load_matrices(b, rows - score_offset<D>() + lanes + uint32_t(2 * D - 16));
        const auto one = [&](const auto& tile) {
            uint32_t a[2];
            tile.keys.get_half(D / 16, a);
            multiply_add<E>(tile.products[0], a, b[0]);
            multiply_add<E>(tile.products[1], a, b[1]);
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

// sums += map * rows for a warp's 16 keys, 16 rows and its columns. `rows` is their address with
// sum_offset.
template <int D, class E, int kEights>
SEFI_DEVICE void add_rows(float (&sums)[kEights][4], const uint32_t (&map)[4], uint32_t rows) {
#pragma unroll
    for (int e = 0; e + 2 <= kEights; e += 2) {
        uint32_t b[4];
        load_transposed(b, rows + uint32_t(16 * e));
        multiply_add<E>(sums[e], map, b[0], b[1]);
        multiply_add<E>(sums[e + 1], map, b[2], b[3]);
    }
    if constexpr (kEights % 2) {
        uint32_t b[2];
        load_transposed(b, rows + uint32_t(16 * (kEights - 1)));
        multiply_add<E>(sums[kEights - 1], map, b[0], b[1]);
    }
}

// Adds the gradients of chosen columns to those of 16 keys and the rows from `first` on.
SEFI_DEVICE void add_map_gradients(const BackwardArguments& a, int64_t first, int tile,
                                   float (&slope)[2][4]) {
    const int64_t b = blockIdx.x / unsigned(a.call.heads);
    const int64_t map = a.call.probs_all_heads ? int64_t(blockIdx.x) : b;
    for (int64_t t = 0; t < a.call.probs_count; ++t) {
        const int64_t place = a.call.probs_positions[b * a.call.probs_positions_batch + t] - 16 * tile;
        const float* const gradient =
            a.call.grad_attn_probs + (map * a.call.probs_count + t) * a.call.queries;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int64_t row = first + 8 * (i / 4) + 2 * (lane() % 4) + i % 2;
            if (place == lane() / 4 + 8 * (i % 4 / 2) && row < a.call.queries) {
                slope[i / 4][i % 4] += a.map_share * gradient[row];
            }
        }
    }
}

// The maps that weigh 16 rows in the sums of 16 keys, packed as left factors: of query rows dS_t
// and of dO A_t, or of query rows dS_r alone. `rows` is the stage's address, `of_rows` its four
// numbers a row, `chunk` which 16 of its rows.
template <int D, class E, int kRows, int kMaps, class Tile>
SEFI_DEVICE void key_maps(const BackwardArguments& a, const Tile& key, const Tile& value,
                          const Tile& reference, const KeyNumbers& numbers, uint32_t rows,
                          const float* of_rows, int chunk, int64_t first, int tile,
                          uint32_t (&attn_probs)[kMaps][4]) {
    constexpr bool kReferenceOnly = kMaps == 1;
    const uint32_t at = rows + uint32_t(16 * chunk * Layout<D>::kStride) + score_offset<D>();
    float target[2][4], slope[2][4] = {}, anchor[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        target[i / 4][i % 4] = anchor[i / 4][i % 4] = numbers.bias[i % 4 / 2];
    }
    if (a.with_reference) {
        multiply_rows<D, E>(at, Factor{key, target}, Factor{reference, anchor});
    } else {
        multiply_rows<D, E>(at, Factor{key, target});
    }
    if (!kReferenceOnly && a.call.grad_output.data) {
        const uint32_t below = uint32_t(kRows * Layout<D>::kStride);
        multiply_rows<D, E>(at + below, Factor{value, slope});
    }
    if (!kReferenceOnly && a.call.grad_attn_probs) {
        add_map_gradients(a, first + 16 * chunk, tile, slope);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        const float* const own = of_rows + 16 * chunk + 8 * n + 2 * (lane() % 4);
        const auto pair = [&](int kind) {
            return *reinterpret_cast<const float2*>(own + kind * kRows);
        };
        const float2 log_sum = pair(0), mean = pair(1);
        const float2 other_log_sum = pair(2), other_mean = pair(3);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto mine = [&](float2 both) { return i % 2 ? both.y : both.x; };
            const float scale = a.cut.scale_log2;
            const float p = power_of_two(fmaf(target[n][i], scale, -mine(log_sum)));
            float s = slope[n][i] - mine(mean);
            if (a.with_reference) {
                const float other = power_of_two(fmaf(anchor[n][i], scale, -mine(other_log_sum)));
                const float toward = numbers.pull[i / 2] * (p - other);
                s += toward;
                anchor[n][i] = other * (-toward - mine(other_mean));
            }
            target[n][i] = p;
            slope[n][i] = kReferenceOnly ? anchor[n][i] : p * s;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int n = i / 2, from = i % 2 * 2;
        attn_probs[0][i] = pack<E>(slope[n][from], slope[n][from + 1]);
        if (!kReferenceOnly) attn_probs[kMaps - 1][i] = pack<E>(target[n][from], target[n][from + 1]);
    }
}

}  // namespace sefi::cuda::tensor
