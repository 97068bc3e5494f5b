// Defines a table of kernels that multiply bfloat16 by its dot product, and float16 by that of its
// parts where SEFI_MOST_PARTS is 2; the other types are left to plain AVX-512.
#include "cpu/dot_backward.h"
#include "cpu/kernels.h"

namespace sefi {
namespace SEFI_ISA {

template <int kParts>
struct Units {
    using Forward = DotForward<kParts>;
    using Backward = DotBackward<kParts>;
};

// use(units) for the type's number of parts, or other() for a type left to AVX-512.
template <class Use, class Other>
inline auto for_type(DType dtype, const Use& use, const Other& other) {
    if (dtype == DType::bfloat16) return use(Units<1>());
#if SEFI_MOST_PARTS == 2
    if (dtype == DType::float16) return use(Units<2>());
#endif
    return other();
}

static size_t forward_scratch(const Problem& p) {
    return for_type(
        p.dtype, [&](auto units) { return decltype(units)::Forward::scratch_bytes(p); },
        [&] { return avx512_kernels.forward_scratch(p); });
}

static size_t backward_scratch(const BackwardCall& call) {
    return for_type(
        call.dtype, [&](auto units) { return decltype(units)::Backward::scratch_bytes(call); },
        [&] { return avx512_kernels.backward_scratch(call); });
}

static double forward(const ForwardCall& call, int64_t b, int64_t h, int64_t begin, int64_t end,
                      char* scratch) {
    return for_type(
        call.dtype,
        [&](auto units) {
            return typename decltype(units)::Forward(call, b, h, scratch).run(begin, end);
        },
        [&] { return avx512_kernels.forward(call, b, h, begin, end, scratch); });
}

static void backward(const BackwardCall& call, int64_t b, int64_t h, int64_t begin, int64_t end,
                     const KeyGradients& gradients, char* scratch) {
    for_type(
        call.dtype,
        [&](auto units) {
            typename decltype(units)::Backward(call, b, h, scratch).run(begin, end, gradients);
        },
        [&] { avx512_kernels.backward(call, b, h, begin, end, gradients, scratch); });
}

}  // namespace SEFI_ISA
}  // namespace sefi

#define SEFI_TABLE(name)                                                                    \
    const sefi::Kernels sefi::name##_kernels = {                                            \
        #name, sefi::SEFI_ISA::forward_scratch, sefi::SEFI_ISA::backward_scratch,           \
        sefi::SEFI_ISA::forward, sefi::SEFI_ISA::backward, sefi::SEFI_ISA::store_row}
