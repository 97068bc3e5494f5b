// The emulated csrc/cuda/ptx.h: the same functions by the tables of the PTX ISA.
#pragma once

#include <cuda_runtime.h>

#include "formats.h"

namespace sefi::cuda {

#define SEFI_DEVICE inline

using Half = ::emulation::Half;
using BFloat16 = ::emulation::BFloat16;

template <class E>
uint32_t pack(float first, float second) {
    return uint32_t(E(first).bits) | uint32_t(E(second).bits) << 16;
}

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return x.wide(); }
inline float to_float(BFloat16 x) { return x.wide(); }
inline void store_float(float x, float& to) { to = x; }
template <class E>
void store_float(float x, E& to) {
    to = E(x);
}

inline float exp2_approx(float x) {
    const float power = std::exp2(x);
    return power < 1.17549435e-38f ? 0.0f : power;
}

inline float rcp_approx(float x) { return 1.0f / x; }
inline float mul_rn(float x, float y) { return x * y; }

inline char* shared_memory() { return ::emulation::shared_memory(); }
inline uint32_t shared_address(const void* pointer) { return ::emulation::shared_offset(pointer); }

inline void cp_async(uint32_t to, const void* from, bool inside) {
    ::emulation::cp_async(to, from, inside ? 16 : 0);
}
inline void cp_async_commit() { ::emulation::cp_async_commit(); }
template <int kBut>
void cp_async_wait() {
    ::emulation::cp_async_wait(kBut);
}

inline void launch_dependents() {}
inline void wait_for_dependency() {}

inline void sync_warp_pair() { ::emulation::warp_pair_barrier(); }

// Lane l receives elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each matrix or of its
// transpose.
template <int kCount, bool kTransposed>
void ldmatrix_lanes(uint32_t (&r)[kCount], uint32_t row) {
    ::emulation::Lane& lane = ::emulation::my_lane();
    lane.in[0] = row;
    ::emulation::collective([](::emulation::Lane* lanes) {
        for (int i = 0; i < kCount; ++i) {
            uint16_t matrix[8][8];
            for (int j = 0; j < 8; ++j) {
                std::memcpy(matrix[j], ::emulation::shared_at(lanes[8 * i + j].in[0], 16), 16);
            }
            for (int l = 0; l < 32; ++l) {
                const int y = l / 4, x = 2 * (l % 4);
                const uint32_t low = kTransposed ? matrix[x][y] : matrix[y][x];
                const uint32_t high = kTransposed ? matrix[x + 1][y] : matrix[y][x + 1];
                lanes[l].out[i] = low | high << 16;
            }
        }
    });
    for (int i = 0; i < kCount; ++i) r[i] = lane.out[i];
}

template <int kCount>
void ldmatrix(uint32_t (&r)[kCount], uint32_t row) {
    ldmatrix_lanes<kCount, false>(r, row);
}
template <int kCount>
void ldmatrix_trans(uint32_t (&r)[kCount], uint32_t row) {
    ldmatrix_lanes<kCount, true>(r, row);
}

// D = A B + C with A [16][kInner] by rows, B [kInner][8] by columns; in: A, then B, then C.
template <class E, int kInner>
void mma_lanes(::emulation::Lane* lanes) {
    constexpr int kA = kInner / 4, kB = kInner / 8;
    static float a[16][kInner], b[kInner][8];
    const auto element = [](uint32_t word, int which) {
        E e;
        e.bits = uint16_t(word >> (16 * which));
        return e.wide();
    };
    for (int l = 0; l < 32; ++l) {
        const int group = l / 4, inner = 2 * (l % 4);
        for (int i = 0; i < kA; ++i) {
            for (int e = 0; e < 2; ++e) {
                a[group + 8 * (i % 2)][inner + e + 8 * (i / 2)] = element(lanes[l].in[i], e);
            }
        }
        for (int i = 0; i < kB; ++i) {
            for (int e = 0; e < 2; ++e) {
                b[inner + e + 8 * i][group] = element(lanes[l].in[kA + i], e);
            }
        }
    }
    for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
            float sum;
            std::memcpy(&sum, &lanes[l].in[kA + kB + i], 4);
            for (int k = 0; k < kInner; ++k) sum += a[row][k] * b[k][column];
            std::memcpy(&lanes[l].out[i], &sum, 4);
        }
    }
}

template <class E>
void mma_sync(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ::emulation::Lane& lane = ::emulation::my_lane();
    const uint32_t b[2] = {b0, b1};
    std::memcpy(lane.in, a, 16);
    std::memcpy(lane.in + 4, b, 8);
    std::memcpy(lane.in + 6, sums, 16);
    ::emulation::collective(mma_lanes<E, 16>);
    std::memcpy(sums, lane.out, 16);
}

template <class E>
void mma_sync(float (&sums)[4], const uint32_t (&a)[2], uint32_t b0) {
    ::emulation::Lane& lane = ::emulation::my_lane();
    std::memcpy(lane.in, a, 8);
    lane.in[2] = b0;
    std::memcpy(lane.in + 3, sums, 16);
    ::emulation::collective(mma_lanes<E, 8>);
    std::memcpy(sums, lane.out, 16);
}

}  // namespace sefi::cuda
