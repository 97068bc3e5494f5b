// The table of functions that each instruction set provides.
#pragma once

#include <cstddef>

#include "problem.h"

namespace sefi {

struct Kernels {
    const char* name;
    // Bytes of scratch memory that one thread needs.
    size_t (*forward_scratch)(const Problem&);
    size_t (*backward_scratch)(const BackwardCall&);
    // One head of one sample for the query rows [begin, end). Returns the head's unscaled subject loss.
    double (*forward)(const ForwardCall&, int64_t b, int64_t h, int64_t begin, int64_t end,
                      char* scratch);
    void (*backward)(const BackwardCall&, int64_t b, int64_t h, int64_t begin, int64_t end,
                     const KeyGradients&, char* scratch);
    // count elements of factor * row in the given dtype; row is readable for 64 bytes more.
    void (*store_row)(const float* row, int64_t count, float factor, char* target, DType dtype);
};

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;
#endif

}  // namespace sefi
