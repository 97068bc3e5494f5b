// Kernels for processors with AVX-512 (F, BW, DQ, VL).
#define SEFI_ISA avx512
#include "cpu/attention_bwd.h"
#include "cpu/isa.h"

SEFI_KERNELS(avx512_kernels, ForwardUnit, BackwardUnit);
