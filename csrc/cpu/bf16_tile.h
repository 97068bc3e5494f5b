// Products of 16 x 32 tiles of bfloat16 with float32 sums, by the matrix unit (AMX) or the two-term
// dot product (AVX-512 BF16).
//
// A float16 number is the sum of two bfloat16 parts. A product of two such numbers is the sum of
// three products of parts, because the product of the two small ones is below the rounding error. A
// bfloat16 number is one part. (A float32 number would be three parts and six products, which is no
// faster than plain AVX-512 and needs more memory.)
//
// A tile holds its terms in pairs, the same pairs in both operands: adjacent terms for one part,
// terms i and i + 16 of 32 for two parts.
#pragma once

#include "cpu/simd.h"
#include "problem.h"

namespace sefi {
namespace SEFI_ISA {

constexpr int kTileSide = 16, kTileDepth = 32;
constexpr int64_t kTileElements = kTileSide * kTileDepth;

constexpr int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Left operand: tiles of 16 rows by 32 columns, [part, pair of row tiles, depth, 2].
struct LeftTiles {
    uint16_t* data = nullptr;
    int64_t pairs = 0, depth = 0;

    uint16_t* tile(int part, int64_t row_tile, int64_t k) const {
        const int64_t pair = part * pairs + row_tile / 2;
        return data + ((pair * depth + k) * 2 + row_tile % 2) * kTileElements;
    }
    static int64_t elements(int parts, int64_t pairs, int64_t depth) {
        return parts * pairs * depth * 2 * kTileElements;
    }
};

// Right operand: tiles of 16 columns and 32 terms, [16 pairs, 16, 2]. Strides count tiles.
struct RightTiles {
    uint16_t* data = nullptr;
    int64_t part = 0, column = 0, step = 0;

    uint16_t* tile(int p, int64_t column_tile, int64_t k) const {
        return data + (p * part + column_tile * column + k * step) * kTileElements;
    }
};

// Right operand whose terms are the rows of left tiles, after interleave_rows.
inline RightTiles interleaved(const LeftTiles& rows) {
    return {rows.data, rows.pairs * rows.depth * 2, 1, rows.depth * 2};
}

// Multiply all pairs of parts that count, in an order in which consecutive pairs share a part.
template <int kParts, class LoadLeft, class LoadRight, class Multiply>
SEFI_INLINE void for_products(const LoadLeft& left, const LoadRight& right,
                              const Multiply& multiply) {
    left(0);
    if constexpr (kParts == 2) {
        right(1);
        multiply();
    }
    right(0);
    multiply();
    if constexpr (kParts == 2) {
        left(1);
        multiply();
    }
}

#if defined(__AMX_BF16__)

// Configures the eight tile registers of the calling thread as 16 rows of 64 bytes.
class MatrixUnit {
public:
    MatrixUnit() {
        struct alignas(64) Config {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = 64;
            config.rows[i] = kTileSide;
        }
        _tile_loadconfig(&config);
    }
    ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// Called regularly during other work: the matrix unit powers down after about 1,700 idle cycles and
// needs 1,000 to power up. Overwrites a tile register.
SEFI_INLINE void keep_awake() { _tile_dpbf16ps(0, 4, 6); }

template <int kParts, int I, int J>
inline void multiply_block(const LeftTiles& a, int64_t i, const RightTiles& b, int64_t j,
                           int64_t depth, float* c, int64_t stride, bool add) {
    const int64_t bytes = 4 * stride;
    float *const c01 = c + kTileSide, *const c10 = c + kTileSide * stride;
    float* const c11 = c10 + kTileSide;
    // The compiler does not know that loading a tile reads memory.
    __asm__ volatile("" ::: "memory");
    if (add) {
        _tile_loadd(0, c, bytes);
        if constexpr (J == 2) _tile_loadd(1, c01, bytes);
        if constexpr (I == 2) _tile_loadd(2, c10, bytes);
        if constexpr (I == 2 && J == 2) _tile_loadd(3, c11, bytes);
    } else {
        _tile_zero(0);
        if constexpr (J == 2) _tile_zero(1);
        if constexpr (I == 2) _tile_zero(2);
        if constexpr (I == 2 && J == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; ++k) {
        for_products<kParts>(
            [&](int part) __attribute__((always_inline)) {
                _tile_loadd(4, a.tile(part, i, k), 64);
                if constexpr (I == 2) _tile_loadd(5, a.tile(part, i + 1, k), 64);
            },
            [&](int part) __attribute__((always_inline)) {
                _tile_loadd(6, b.tile(part, j, k), 64);
                if constexpr (J == 2) _tile_loadd(7, b.tile(part, j + 1, k), 64);
            },
            [&]() __attribute__((always_inline)) {
                _tile_dpbf16ps(0, 4, 6);
                if constexpr (J == 2) _tile_dpbf16ps(1, 4, 7);
                if constexpr (I == 2) _tile_dpbf16ps(2, 5, 6);
                if constexpr (I == 2 && J == 2) _tile_dpbf16ps(3, 5, 7);
            });
    }
    _tile_stored(0, c, bytes);
    if constexpr (J == 2) _tile_stored(1, c01, bytes);
    if constexpr (I == 2) _tile_stored(2, c10, bytes);
    if constexpr (I == 2 && J == 2) _tile_stored(3, c11, bytes);
}

#else

struct MatrixUnit {
    MatrixUnit() {}
};

SEFI_INLINE void keep_awake() {}

template <int kParts, int I, int J>
inline void multiply_block(const LeftTiles& a, int64_t i, const RightTiles& b, int64_t j,
                           int64_t depth, float* c, int64_t stride, bool add) {
    constexpr int kRows = J == 2 ? 8 : 16;
    for (int64_t row = 0; row < I * kTileSide; row += kRows) {
        Vec sums[kRows][J];
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int n = 0; n < J; ++n) {
                sums[r][n] = add ? load(c + (row + r) * stride + n * kLanes) : Vec{};
            }
        }
        const uint16_t *left = nullptr, *right[J] = {};
        for (int64_t k = 0; k < depth; ++k) {
            for_products<kParts>(
                [&](int part) __attribute__((always_inline)) {
                    left = a.tile(part, i + row / kTileSide, k) + row % kTileSide * kTileDepth;
                },
                [&](int part) __attribute__((always_inline)) {
                    for (int n = 0; n < J; ++n) right[n] = b.tile(part, j + n, k);
                },
                [&]() __attribute__((always_inline)) {
                    for (int t = 0; t < kTileDepth; t += 2) {
                        __m512bh terms[J];
#pragma GCC unroll 2
                        for (int n = 0; n < J; ++n) {
                            terms[n] = (__m512bh)_mm512_loadu_si512(right[n] + t * kTileSide);
                        }
#pragma GCC unroll 16
                        for (int r = 0; r < kRows; ++r) {
                            int32_t pair;
                            __builtin_memcpy(&pair, left + r * kTileDepth + t, 4);
                            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
                            for (int n = 0; n < J; ++n) {
                                sums[r][n] =
                                    (Vec)_mm512_dpbf16_ps((__m512)sums[r][n], terms[n], both);
                            }
                        }
                    }
                });
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (int n = 0; n < J; ++n) store(c + (row + r) * stride + n * kLanes, sums[r][n]);
        }
    }
}

#endif

// c [16 rows, 16 columns, stride] = a b, or += with `add`; rows and columns count tiles.
template <int kParts>
inline void multiply(const LeftTiles& a, int64_t first, int64_t rows, const RightTiles& b,
                     int64_t columns, int64_t depth, float* c, int64_t stride, bool add) {
    for (int64_t j = 0; j < columns; j += 2) {
        const bool wide = j + 1 < columns;
        for (int64_t i = 0; i < rows; i += 2) {
            float* to = c + i * kTileSide * stride + j * kTileSide;
            const bool tall = i + 1 < rows;
            if (tall && wide) {
                multiply_block<kParts, 2, 2>(a, first + i, b, j, depth, to, stride, add);
            } else if (tall) {
                multiply_block<kParts, 2, 1>(a, first + i, b, j, depth, to, stride, add);
            } else if (wide) {
                multiply_block<kParts, 1, 2>(a, first + i, b, j, depth, to, stride, add);
            } else {
                multiply_block<kParts, 1, 1>(a, first + i, b, j, depth, to, stride, add);
            }
        }
    }
}

}  // namespace SEFI_ISA
}  // namespace sefi
