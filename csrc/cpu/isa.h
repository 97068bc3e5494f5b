// Definition of the kernel table of one instruction set, included by its translation unit.
#include "cpu/attention_bwd.h"
#include "cpu/kernels.h"

namespace sefi {
namespace SEFI_ISA {

static double forward(const ForwardCall& call, int64_t b, int64_t h, int64_t begin, int64_t end,
                      char* scratch) {
    return ForwardUnit(call, b, h, scratch).run(begin, end);
}

static void backward(const BackwardCall& call, int64_t b, int64_t h, int64_t begin, int64_t end,
                     const KeyGradients& gradients, char* scratch) {
    BackwardUnit(call, b, h, scratch).run(begin, end, gradients);
}

}  // namespace SEFI_ISA
}  // namespace sefi

#define SEFI_TABLE(name)                                                                     \
    const sefi::Kernels sefi::name##_kernels = {#name,                                       \
                                                sefi::SEFI_ISA::ForwardUnit::scratch_bytes,  \
                                                sefi::SEFI_ISA::BackwardUnit::scratch_bytes, \
                                                sefi::SEFI_ISA::forward,                     \
                                                sefi::SEFI_ISA::backward,                    \
                                                sefi::SEFI_ISA::store_row}
