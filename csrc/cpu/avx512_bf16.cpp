// The kernels for processors with AVX-512 and its dot products of bfloat16.
#define SEFI_ISA avx512_bf16
#define SEFI_MOST_PARTS 1
#include "cpu/dot_isa.h"

SEFI_TABLE(avx512_bf16);
