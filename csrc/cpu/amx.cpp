// The kernels for processors with the AMX matrix unit for bfloat16.
#define SEFI_ISA amx
#define SEFI_MOST_PARTS 2
#include "cpu/dot_isa.h"

SEFI_TABLE(amx);
