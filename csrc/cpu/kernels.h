// Tables of the functions of an instruction set.
#pragma once

#include <cstddef>

#include "problem.h"

namespace sefi {

struct Kernels {
    // Bytes of scratch memory per thread.
    size_t (*forward_scratch)(const Problem&);
    size_t (*backward_scratch)(const BackwardCall&);
    // Query rows [begin, end) of one head. Forward returns their sum of the subject loss.
    double (*forward)(const ForwardCall&, int64_t b, int64_t h, int64_t begin, int64_t end,
                      char* scratch);
    void (*backward)(const BackwardCall&, int64_t b, int64_t h, int64_t begin, int64_t end,
                     const KeyGradients&, char* scratch);
    // Store factor * row, count elements of the dtype. 64 more bytes of row are readable.
    void (*store_row)(const float* row, int64_t count, float factor, char* target, DType dtype);
};

// The last three are for bfloat16 or float16 alone.
extern const Kernels generic_kernels, avx2_kernels, avx512_kernels;
extern const Kernels avx512_bf16_kernels, amx_kernels, amx_float16_kernels;

}  // namespace sefi
