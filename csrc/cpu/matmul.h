// Matrix products of a tile, accumulated in registers block by block.
//
// All nine products have one form, C[i][lanes] = sum over k of A(i, k) * B[k][lanes]: scalars of A
// are broadcast and multiplied by J vectors of B. Blocks of I rows by J vectors fill the register
// file, so that each step of k loads I + J words for I * J multiply-adds.
#pragma once

#include "cpu/prefetch.h"

namespace sefi {
namespace SEFI_ISA {

// Rows of a block of j vectors: registers must hold the accumulators, j vectors of B and a scalar.
constexpr int block_rows(int j) {
    return kRegisters == 32 ? (j == 1   ? 12
                               : j == 2 ? 12
                               : j == 3 ? 8
                               : j == 4 ? 6
                                        : 5)
                            : (j == 1   ? 8
                               : j == 2 ? 6
                                        : 3);
}
constexpr int kWidestBlock = kRegisters == 32 ? 5 : 3;

enum class Scalars {
    along_rows,    // A(i, k) = a[i * stride + k]
    along_columns  // A(i, k) = a[k * stride + i]
};

template <int I, int J, Scalars kScalars>
SEFI_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                int64_t depth, Vec (&acc)[I][J]) {
    for (int64_t k = 0; k < depth; ++k) {
        Vec v[J];
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) v[j] = load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) {
            const float s =
                kScalars == Scalars::along_rows ? a[i * a_stride + k] : a[k * a_stride + i];
#pragma GCC unroll 8
            for (int j = 0; j < J; ++j) acc[i][j] = fma(broadcast(s), v[j], acc[i][j]);
        }
    }
}

template <int I, int J, Scalars kScalars, class State, class Visit>
inline void product_block(int64_t i, const float* a, int64_t a_stride, const float* b,
                          int64_t b_stride, int64_t depth, State& state, const Visit& visit) {
    Vec acc[I][J];
#pragma GCC unroll 16
    for (int r = 0; r < I; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) acc[r][j] = Vec{};
    }
    const float* first = kScalars == Scalars::along_rows ? a + i * a_stride : a + i;
    multiply_block<I, J, kScalars>(first, a_stride, b, b_stride, depth, acc);
    // No store can alias a copy, so it stays in registers for the whole block.
    State local = state;
    // Unrolled, because an index known only at run time would move acc to memory.
#pragma GCC unroll 16
    for (int r = 0; r < I; ++r) visit(i + r, acc[r], local);
    state = local;
}

template <int I, int J, Scalars kScalars, class State, class Visit>
SEFI_INLINE void product_dispatch(int64_t size, int64_t i, const float* a, int64_t a_stride,
                                  const float* b, int64_t b_stride, int64_t depth, State& state,
                                  const Visit& visit) {
    if constexpr (I > 1) {
        if (size < I) {
            product_dispatch<I - 1, J, kScalars>(size, i, a, a_stride, b, b_stride, depth, state,
                                                 visit);
            return;
        }
    }
    product_block<I, J, kScalars>(i, a, a_stride, b, b_stride, depth, state, visit);
}

// Call visit(row, sums, state) for every row in order, in blocks of nearly equal size. `visit` must
// be inlined; `state` is what it carries from row to row, small and copied freely.
template <int J, Scalars kScalars, class State, class Visit>
inline void product(int64_t rows, const float* a, int64_t a_stride, const float* b,
                    int64_t b_stride, int64_t depth, State& state, const Visit& visit,
                    Prefetcher* prefetcher = nullptr) {
    constexpr int kMost = block_rows(J);
    const int64_t blocks = (rows + kMost - 1) / kMost;
    for (int64_t block = 0, i = 0; block < blocks; ++block) {
        const int64_t size = (rows - i + blocks - block - 1) / (blocks - block);
        if (prefetcher) prefetcher->step();
        product_dispatch<kMost, J, kScalars>(size, i, a, a_stride, b, b_stride, depth, state,
                                             visit);
        i += size;
    }
}

// Call visit(row, sums) for every row.
template <int J, Scalars kScalars, class Visit>
SEFI_INLINE void product(int64_t rows, const float* a, int64_t a_stride, const float* b,
                         int64_t b_stride, int64_t depth, const Visit& visit,
                         Prefetcher* prefetcher = nullptr) {
    struct Nothing {
    } nothing;
    product<J, kScalars>(
        rows, a, a_stride, b, b_stride, depth, nothing,
        [=](int64_t i, const Vec(&sums)[J], Nothing&)
            __attribute__((always_inline)) { visit(i, sums); },
        prefetcher);
}

template <int J>
SEFI_INLINE void accumulate_columns(int64_t rows, const float* a, int64_t a_stride, const float* b,
                                    int64_t b_stride, int64_t depth, float* c, int64_t c_stride) {
    product<J, Scalars::along_rows>(
        rows, a, a_stride, b, b_stride, depth,
        [=](int64_t i, const Vec(&sums)[J]) __attribute__((always_inline)) {
            float* to = c + i * c_stride;
            for (int j = 0; j < J; ++j) store(to + j * kLanes, load(to + j * kLanes) + sums[j]);
        });
}

// c[i][*] += sum over k < depth of a[i][k] * b[k][*]. Rows of b and c have `vectors` vectors, and c
// is dense.
inline void accumulate_product(int64_t rows, const float* a, int64_t a_stride, const float* b,
                               int64_t stride, int64_t vectors, int64_t depth, float* c) {
    const int64_t c_stride = vectors * kLanes;
    const int64_t blocks = (vectors + kWidestBlock - 1) / kWidestBlock;
    for (int64_t block = 0, j = 0; block < blocks; ++block) {
        const int64_t width = (vectors - j + blocks - block - 1) / (blocks - block);
        const float* from = b + j * kLanes;
        float* to = c + j * kLanes;
        switch (width) {
            case 1:
                accumulate_columns<1>(rows, a, a_stride, from, stride, depth, to, c_stride);
                break;
            case 2:
                accumulate_columns<2>(rows, a, a_stride, from, stride, depth, to, c_stride);
                break;
            case 3:
                accumulate_columns<3>(rows, a, a_stride, from, stride, depth, to, c_stride);
                break;
            default:
                if constexpr (kWidestBlock > 3) {
                    if (width == 4) {
                        accumulate_columns<4>(rows, a, a_stride, from, stride, depth, to, c_stride);
                    } else {
                        accumulate_columns<5>(rows, a, a_stride, from, stride, depth, to, c_stride);
                    }
                }
        }
        j += width;
    }
}

}  // namespace SEFI_ISA
}  // namespace sefi
