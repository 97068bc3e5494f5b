// Packing of rows of tensors and of float32 scratch memory as tiles of bfloat16 parts.
#pragma once

#include "cpu/bf16_tile.h"
#include "cpu/unit.h"

namespace sefi {
namespace SEFI_ISA {

typedef uint16_t Halves __attribute__((vector_size(64), may_alias));

SEFI_INLINE Halves load_halves(const uint16_t* p) { return (Halves)_mm512_loadu_si512(p); }
SEFI_INLINE void store_halves(uint16_t* p, Halves v) { _mm512_storeu_si512(p, (__m512i)v); }

// Upper halves of 32-bit lanes: of `low` at even places, of `high` at odd places.
SEFI_INLINE Halves upper_halves(UIntVec low, UIntVec high) {
    return (Halves)(UIntVec)((low >> 16) | (high & 0xffff0000u));
}

// Split a number into two bfloat16 parts: the upper half rounded, ties away from zero, and the
// rest. A number that is not finite is the second part alone, which is multiplied only by the first
// part of the other factor. Any other product might be infinity times zero or infinity minus
// infinity. It is not rounded, because the bits of a NaN might overflow into those of a zero.
SEFI_INLINE void split_float(Vec v, UIntVec& first, UIntVec& second) {
    constexpr int kNanOrInfinite = 0x99;
    const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask((__m512)v, kNanOrInfinite));
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(int(0xffff0000u));
    first = (UIntVec)_mm512_maskz_and_epi32(finite, _mm512_add_epi32((__m512i)v, half), upper);
    const __m512i rest = (__m512i)(v - (Vec)first);
    second = (UIntVec)_mm512_mask_add_epi32(rest, finite, rest, half);
}

// Split 32 numbers into parts, in the order of the pairs of a tile.
template <int kParts>
SEFI_INLINE void split(Vec low, Vec high, Halves (&parts)[kParts]) {
    if constexpr (kParts == 1) {
        parts[0] = (Halves)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    } else {
        UIntVec low_parts[2], high_parts[2];
        split_float(low, low_parts[0], low_parts[1]);
        split_float(high, high_parts[0], high_parts[1]);
        for (int p = 0; p < 2; ++p) parts[p] = upper_halves(low_parts[p], high_parts[p]);
    }
}

// Load up to 32 elements of a row, and zeros.
template <int kParts>
SEFI_INLINE void load_parts(const char* from, int64_t count, Halves (&parts)[kParts]) {
    const __mmask32 mask = count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1u;
    const Halves bits = (Halves)_mm512_maskz_loadu_epi16(mask, from);
    if constexpr (kParts == 1) {
        parts[0] = bits;
    } else {
        split<kParts>(from_float16((HalfVec)_mm512_castsi512_si256((__m512i)bits)),
                      from_float16((HalfVec)_mm512_extracti64x4_epi64((__m512i)bits, 1)), parts);
    }
}

// Pack a row, or zeros for a null pointer, as row `row` of left tiles.
template <int kParts>
inline void pack_row(const char* from, int64_t head_dim, const LeftTiles& to, int64_t row) {
    for (int64_t k = 0; k < to.depth; ++k) {
        Halves parts[kParts] = {};
        if (from) load_parts<kParts>(from + 2 * k * kTileDepth, head_dim - k * kTileDepth, parts);
        for (int p = 0; p < kParts; ++p) {
            store_halves(to.tile(p, row / kTileSide, k) + row % kTileSide * kTileDepth, parts[p]);
        }
    }
}

// Pack count query rows from n on, and zeros, as a pair of row tiles.
template <int kParts>
inline void pack_query_rows(const View& view, DType dtype, int64_t b, int64_t h, int64_t n,
                            int64_t count, int64_t head_dim, const LeftTiles& to, int64_t pair) {
    for (int64_t i = 0; i < 2 * kTileSide; ++i) {
        if (i % kTileSide == 0) keep_awake();
        const char* from = i < count ? view.at(dtype, b, h, n + i) : nullptr;
        pack_row<kParts>(from, head_dim, to, 2 * kTileSide * pair + i);
    }
}

template <int kParts>
inline void pack_key_rows(const View& view, DType dtype, int64_t b, int64_t h, const KeyList& keys,
                          int64_t head_dim, const LeftTiles& to) {
    for (int64_t i = 0; i < to.pairs * 2 * kTileSide; ++i) {
        const char* from = i < keys.count ? view.at(dtype, b, h, keys.index[i]) : nullptr;
        pack_row<kParts>(from, head_dim, to, i);
    }
}

// Pack a float32 row of `vectors` vectors as row `row` of the first pair of left tiles.
template <int kParts, class Value>
SEFI_INLINE void pack_values(int64_t vectors, const LeftTiles& to, int64_t row,
                             const Value& value) {
    if (row % 8 == 0) keep_awake();
    for (int64_t k = 0; k < to.depth; ++k) {
        const Vec low = value(2 * k), high = 2 * k + 1 < vectors ? value(2 * k + 1) : Vec{};
        Halves parts[kParts];
        split<kParts>(low, high, parts);
        for (int p = 0; p < kParts; ++p) {
            store_halves(to.tile(p, row / kTileSide, k) + row % kTileSide * kTileDepth, parts[p]);
        }
    }
}

// Interleave the elements of two rows: `first` has the first 16 columns, `second` the others.
template <int kParts>
SEFI_INLINE void interleave(Halves a, Halves b, Halves& first, Halves& second) {
    if constexpr (kParts == 1) {
        const Halves low = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const Halves high = low + uint16_t(16);
        first = (Halves)_mm512_permutex2var_epi16((__m512i)a, (__m512i)low, (__m512i)b);
        second = (Halves)_mm512_permutex2var_epi16((__m512i)a, (__m512i)high, (__m512i)b);
    } else {
        first = (Halves)(UIntVec)(((UIntVec)a & 0xffffu) | ((UIntVec)b << 16));
        second = upper_halves((UIntVec)a, (UIntVec)b);
    }
}

// Turn a pair of left tiles into two right tiles whose terms are the 32 rows, in place.
template <int kParts>
inline void interleave_rows(const LeftTiles& rows, int64_t pair) {
    constexpr int kNext = kParts == 1 ? 1 : kTileSide, kStep = kParts == 1 ? 2 : 1;
    for (int p = 0; p < kParts; ++p) {
        for (int64_t k = 0; k < rows.depth; ++k) {
            uint16_t* tile = rows.tile(p, 2 * pair, k);
            Halves first[kTileSide], second[kTileSide];
#pragma GCC unroll 16
            for (int i = 0; i < kTileSide; ++i) {
                const uint16_t* row = tile + kStep * i * kTileDepth;
                interleave<kParts>(load_halves(row), load_halves(row + kNext * kTileDepth),
                                   first[i], second[i]);
            }
            for (int i = 0; i < kTileSide; ++i) {
                store_halves(tile + i * kTileDepth, first[i]);
                store_halves(tile + (kTileSide + i) * kTileDepth, second[i]);
            }
        }
    }
}

// Transpose a tile of pairs of elements.
SEFI_INLINE void transpose_tile(const uint16_t* from, uint16_t* to) {
    const float* rows = reinterpret_cast<const float*>(from);
    for (int i = 0; i < 4; ++i) {
        Vec columns[4];
        load_columns(rows + 4 * i, kTileSide, columns);
        for (int j = 0; j < 4; ++j) {
            store(reinterpret_cast<float*>(to) + (4 * i + j) * kTileSide, columns[j]);
        }
    }
}

// Right operand [part, column, depth] whose columns are the rows of `rows`, times `sign`.
template <int kParts>
inline void transpose_rows(const LeftTiles& rows, const RightTiles& to, float sign) {
    const Halves flip = (Halves)_mm512_set1_epi16(int16_t(0x8000));
    for (int p = 0; p < kParts; ++p) {
        for (int64_t j = 0; j < to.part / to.column; ++j) {
            for (int64_t k = 0; k < rows.depth; ++k) {
                uint16_t* tile = to.tile(p, j, k);
                transpose_tile(rows.tile(p, j, k), tile);
                for (int i = 0; sign < 0 && i < kTileSide; ++i) {
                    uint16_t* row = tile + i * kTileDepth;
                    store_halves(row, load_halves(row) ^ flip);
                }
            }
        }
    }
}

// Left tiles of the transpose: rows of `to` are the columns of `tiles`, after interleave_rows.
template <int kParts>
inline void transpose_interleaved(const LeftTiles& tiles, int64_t columns, const LeftTiles& to,
                                  int64_t step) {
    const RightTiles from = interleaved(tiles);
    for (int p = 0; p < kParts; ++p) {
        for (int64_t j = 0; j < columns; ++j)
            transpose_tile(from.tile(p, j, 0), to.tile(p, j, step));
    }
}

}  // namespace SEFI_ISA
}  // namespace sefi
