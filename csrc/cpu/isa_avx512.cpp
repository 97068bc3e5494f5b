// Kernels for processors with AVX-512 (F, BW, DQ, VL).
#define SEFI_ISA avx512
#include "cpu/isa.h"

SEFI_TABLE(avx512);
