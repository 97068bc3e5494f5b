// Kernels for processors with the AMX matrix unit for bfloat16.
#define SEFI_ISA amx
#define SEFI_MAX_PARTS 2
#include "cpu/bf16_isa.h"

SEFI_TABLE(amx);
