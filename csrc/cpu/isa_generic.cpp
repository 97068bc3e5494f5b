// Kernels in plain vector code, for any processor.
#define SEFI_ISA generic
#include "cpu/isa.h"

SEFI_TABLE(generic);
