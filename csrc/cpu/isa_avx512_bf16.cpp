// Kernels for processors with AVX-512 and its dot product of bfloat16.
#define SEFI_ISA avx512_bf16
#define SEFI_MAX_PARTS 1
#include "cpu/bf16_isa.h"

SEFI_TABLE(avx512_bf16);
