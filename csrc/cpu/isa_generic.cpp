// Kernels for any processor, in plain vector code.
#define SEFI_ISA generic
#include "cpu/attention_bwd.h"
#include "cpu/isa.h"

SEFI_KERNELS(generic_kernels, ForwardUnit, BackwardUnit);
