// Kernels of bfloat16 for processors with the dot product of AVX-512 BF16.
#define SEFI_ISA avx512_bf16
#include "cpu/bf16_bwd.h"
#include "cpu/isa.h"

SEFI_KERNELS(avx512_bf16_kernels, Bf16Forward<1>, Bf16Backward<1>);
