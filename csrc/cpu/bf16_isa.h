// Definition of a kernel table that multiplies bfloat16 by its dot product, and float16 as two
// bfloat16 parts if SEFI_MAX_PARTS is 2. Other dtypes take the AVX-512 kernels.
#include "cpu/bf16_bwd.h"
#include "cpu/kernels.h"

namespace sefi {
namespace SEFI_ISA {

template <int kParts>
struct Units {
    using Forward = Bf16Forward<kParts>;
    using Backward = Bf16Backward<kParts>;
};

// Call use(units) for the number of parts of the dtype, or other() for a dtype of AVX-512.
template <class Use, class Other>
inline auto for_type(DType dtype, const Use& use, const Other& other) {
    if (dtype == DType::bfloat16) return use(Units<1>());
#if SEFI_MAX_PARTS == 2
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

#define SEFI_TABLE(name)                                                          \
    const sefi::Kernels sefi::name##_kernels = {#name,                            \
                                                sefi::SEFI_ISA::forward_scratch,  \
                                                sefi::SEFI_ISA::backward_scratch, \
                                                sefi::SEFI_ISA::forward,          \
                                                sefi::SEFI_ISA::backward,         \
                                                sefi::SEFI_ISA::store_row}
