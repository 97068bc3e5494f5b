// Kernels of bfloat16 and float16 for processors with the AMX matrix unit for bfloat16.
#define SEFI_ISA amx
#include "cpu/bf16_bwd.h"
#include "cpu/isa.h"

SEFI_KERNELS(amx_kernels, Bf16Forward<1>, Bf16Backward<1>);
SEFI_KERNELS(amx_float16_kernels, Bf16Forward<2>, Bf16Backward<2>);
