// What a block loads before its rows: keys, values and reference keys of one head, numbers a key.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

// Whether a sample may attend to a key.
SEFI_DEVICE bool visible(const Problem& p, int64_t b, int key) {
    return key < p.keys && (!p.key_mask || p.key_mask[b * p.key_mask_batch + key]);
}

// 0 for the keys a sample may attend to, -inf for the others: one key a thread.
SEFI_DEVICE void load_bias(const Problem& p, int64_t b, float* bias) {
    const int key = int(threadIdx.x);
    if (key < kKeys) bias[key] = visible(p, b, key) ? 0.0f : -INFINITY;
}

// A key's weight in the subject loss; 0 where it does not exist.
SEFI_DEVICE float weight_of(const Problem& p, int64_t b, int key) {
    if (key >= p.keys) return 0.0f;
    return p.token_weights ? p.token_weights[b * p.token_weights_batch + key] : 1.0f;
}

SEFI_DEVICE void load_weights(const Problem& p, int64_t b, float* weights) {
    const int key = int(threadIdx.x);
    if (key < kKeys) weights[key] = weight_of(p, b, key);
}

// 2 g w / H: what the subject loss's gradient g makes of a difference of probabilities.
SEFI_DEVICE void load_pull(const BackwardCall& call, int64_t b, float* pull) {
    const int key = int(threadIdx.x);
    if (key >= kKeys) return;
    const float weight = weight_of(call, b, key);
    pull[key] = 2.0f * call.grad_subject_loss[b] / float(call.heads) * weight;
}

// A key's 16 bytes from column 8 * eight on, into its row of a tile in the fragments' order of
// columns.
template <int D>
SEFI_DEVICE void store_chunk(uint4 chunk, int eight, char* row) {
    constexpr int kWhole = D / 32 * 4;
    uint32_t* to = reinterpret_cast<uint32_t*>(row);
    if (eight < kWhole) {
        to += eight / 4 * 16 + eight % 4;
        to[0] = chunk.x;
        to[4] = chunk.y;
        to[8] = chunk.z;
        to[12] = chunk.w;
    } else if (D % 32 == 16) {
        to += 4 * kWhole + 2 * (eight - kWhole);
        to[0] = chunk.x;
        to[4] = chunk.y;
        to[1] = chunk.z;
        to[5] = chunk.w;
    } else {
        *reinterpret_cast<uint4*>(to + 4 * kWhole) = chunk;
    }
}

// Keys, values and reference keys of one head into shared memory; a stream without a tile is left
// out. Hidden and missing keys become zeros, so that nothing in them reaches a product. All is
// asked for before the first of it is stored: one wait for all, and for what `meanwhile` loads.
template <int D, int kThreads, class E, class Meanwhile>
SEFI_DEVICE void load_streams(const Problem& p, int64_t b, int64_t h, char* key, char* value,
                              char* reference, const Meanwhile& meanwhile) {
    using Own = Chunks<D, kKeys, kThreads>;
    constexpr int kStreams = 3;
    const E* const heads[kStreams] = {head_of<E>(p.key, b, h), head_of<E>(p.value, b, h),
                                      head_of<E>(p.reference_key, b, h)};
    const int64_t strides[kStreams] = {p.key.row, p.value.row, p.reference_key.row};
    char* const tiles[kStreams] = {key, value, reference};
    uint4 chunks[kStreams][Own::kEach] = {};
    bool wanted[Own::kEach] = {};
    Own::each([&](int i, int k, int) { wanted[i] = visible(p, b, k); });
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
        if (!tiles[s]) continue;
        Own::each([&](int i, int k, int eight) {
            const E* const from = heads[s] + k * strides[s] + 8 * eight;
            if (wanted[i]) chunks[s][i] = *reinterpret_cast<const uint4*>(from);
        });
    }
    meanwhile();
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
        if (!tiles[s]) continue;
        Own::each([&](int i, int k, int eight) {
            store_chunk<D>(chunks[s][i], eight, tiles[s] + k * Layout<D>::kStride);
        });
    }
}

}  // namespace sefi::cuda::tensor
