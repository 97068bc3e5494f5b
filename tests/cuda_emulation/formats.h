// float16 and bfloat16 as bits, rounded to nearest even, for compilers that have neither.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulation {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

struct BFloat16 {
    uint16_t bits;

    BFloat16() = default;
    explicit BFloat16(float x) {
        const uint32_t wide = bits_of(x);
        bits = std::isnan(x) ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    float wide() const { return float_of(uint32_t(bits) << 16); }
};

struct Half {
    uint16_t bits;

    Half() = default;
    explicit Half(float x) {
        const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
        const float size = std::fabs(x);
        if (std::isnan(x)) {
            bits = 0x7fff;
        } else if (size >= 65520.0f) {
            bits = uint16_t(sign | 0x7c00);
        } else if (size < 6.103515625e-5f) {
            // Adding 0.5 rounds to multiples of 2**-24, which the lowest bits count.
            bits = uint16_t(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
        } else {
            const uint32_t wide = bits_of(size);
            bits = uint16_t(sign | ((wide + 0xfff + (wide >> 13 & 1) - (112u << 23)) >> 13));
        }
    }
    float wide() const {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
        if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | rest << 13);
        if (rest < 0x400) return float_of(sign | bits_of(float(rest) * 5.9604644775390625e-8f));
        return float_of(sign | ((rest << 13) + (112u << 23)));
    }
};

}  // namespace emulation
