// Loads of a block before its query rows: keys, values and reference keys of one head, key weights.
#pragma once

#include "cuda/mma_tile.h"

namespace sefi::cuda::mma {

// Whether a sample may attend to a key.
SEFI_DEVICE bool visible(const Problem& p, int64_t b, int key) {
    return key < p.keys && (!p.key_mask || p.key_mask[b * p.key_mask_batch + key]);
}

// Load one key per thread: 0 for a visible key, -inf for a hidden one.
SEFI_DEVICE void load_bias(const Problem& p, int64_t b, float* bias) {
    const int key = int(threadIdx.x);
    if (key < kKeys) bias[key] = visible(p, b, key) ? 0.0f : -INFINITY;
}

// Weight of a key in the subject loss; 0 past the last key.
SEFI_DEVICE float weight_of(const Problem& p, int64_t b, int key) {
    if (key >= p.keys) return 0.0f;
    return p.token_weights ? p.token_weights[b * p.token_weights_batch + key] : 1.0f;
}

SEFI_DEVICE void load_weights(const Problem& p, int64_t b, float* weights) {
    const int key = int(threadIdx.x);
    if (key < kKeys) weights[key] = weight_of(p, b, key);
}

// 2 g w / H: the factor of A_t - A_r in the gradient of the subject loss.
SEFI_DEVICE void load_loss_factor(const BackwardCall& call, int64_t b, float* loss_factor) {
    const int key = int(threadIdx.x);
    if (key >= kKeys) return;
    const float weight = weight_of(call, b, key);
    loss_factor[key] = 2.0f * call.grad_subject_loss[b] / float(call.heads) * weight;
}

// Store 16 bytes of a key from column 8 * n8 on, in the column order of the fragments.
template <int D>
SEFI_DEVICE void store_chunk(uint4 chunk, int n8, char* row) {
    constexpr int kWhole = D / 32 * 4;
    uint32_t* to = reinterpret_cast<uint32_t*>(row);
    if (n8 < kWhole) {
        to += n8 / 4 * 16 + n8 % 4;
        to[0] = chunk.x;
        to[4] = chunk.y;
        to[8] = chunk.z;
        to[12] = chunk.w;
    } else if (D % 32 == 16) {
        to += 4 * kWhole + 2 * (n8 - kWhole);
        to[0] = chunk.x;
        to[4] = chunk.y;
        to[1] = chunk.z;
        to[5] = chunk.w;
    } else {
        *reinterpret_cast<uint4*>(to + 4 * kWhole) = chunk;
    }
}

// Load keys, values and reference keys of one head into shared memory, except streams whose tile is
// null. Hidden and missing keys become zeros, so that no value of theirs reaches a product. All
// loads are issued before the first store, so that the block waits once; so are those of
// `meanwhile`.
template <int D, int kThreads, class E, class Meanwhile>
SEFI_DEVICE void load_kv(const Problem& p, int64_t b, int64_t h, char* key, char* value,
                         char* reference, const Meanwhile& meanwhile) {
    using KvChunks = Chunks<D, kKeys, kThreads>;
    constexpr int kStreams = 3;
    const E* const heads[kStreams] = {head_of<E>(p.key, b, h), head_of<E>(p.value, b, h),
                                      head_of<E>(p.reference_key, b, h)};
    const int64_t strides[kStreams] = {p.key.row, p.value.row, p.reference_key.row};
    char* const tiles[kStreams] = {key, value, reference};
    uint4 chunks[kStreams][KvChunks::kEach] = {};
    bool is_visible[KvChunks::kEach] = {};
    KvChunks::each([&](int i, int k, int) { is_visible[i] = visible(p, b, k); });
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
        if (!tiles[s]) continue;
        KvChunks::each([&](int i, int k, int n8) {
            const E* const from = heads[s] + k * strides[s] + 8 * n8;
            if (is_visible[i]) chunks[s][i] = *reinterpret_cast<const uint4*>(from);
        });
    }
    meanwhile();
#pragma unroll
    for (int s = 0; s < kStreams; ++s) {
        if (!tiles[s]) continue;
        KvChunks::each([&](int i, int k, int n8) {
            store_chunk<D>(chunks[s][i], n8, tiles[s] + k * Layout<D>::kStride);
        });
    }
}

}  // namespace sefi::cuda::mma
