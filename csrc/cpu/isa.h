// Definition of a kernel table, included by the translation unit of an instruction set.
#include "cpu/kernels.h"

namespace sefi {
namespace SEFI_ISA {

template <class Unit>
double run_forward(const ForwardCall& call, int64_t b, int64_t h, int64_t begin, int64_t end,
                   char* scratch) {
    return Unit(call, b, h, scratch).run(begin, end);
}

template <class Unit>
void run_backward(const BackwardCall& call, int64_t b, int64_t h, int64_t begin, int64_t end,
                  const KeyGradients& gradients, char* scratch) {
    Unit(call, b, h, scratch).run(begin, end, gradients);
}

}  // namespace SEFI_ISA
}  // namespace sefi

#define SEFI_KERNELS(table, Forward, Backward)                                           \
    const sefi::Kernels sefi::table = {                                                  \
        sefi::SEFI_ISA::Forward::scratch_bytes, sefi::SEFI_ISA::Backward::scratch_bytes, \
        sefi::SEFI_ISA::run_forward<sefi::SEFI_ISA::Forward>,                            \
        sefi::SEFI_ISA::run_backward<sefi::SEFI_ISA::Backward>, sefi::SEFI_ISA::store_row}
