// Kernels for processors with AVX2, FMA and F16C.
#define SEFI_ISA avx2
#include "cpu/attention_bwd.h"
#include "cpu/isa.h"

SEFI_KERNELS(avx2_kernels, ForwardUnit, BackwardUnit);
