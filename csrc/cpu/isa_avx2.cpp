// Kernels for processors with AVX2, FMA and F16C.
#define SEFI_ISA avx2
#include "cpu/isa.h"

SEFI_TABLE(avx2);
