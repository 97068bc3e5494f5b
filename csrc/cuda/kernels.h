// Host functions that launch the kernels, and the choice among their instantiations.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/params.h"

namespace sefi::cuda {

// Number of blocks with so much shared memory that fit on a multiprocessor, at most `limit`.
inline int occupancy(int64_t shared_bytes, int limit) {
    constexpr int kReserved = 1024;  // the driver's share of each block
    constexpr cudaDeviceAttr kTotal = cudaDevAttrMaxSharedMemoryPerMultiprocessor;
    int device = 0, total = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return limit;
    if (cudaDeviceGetAttribute(&total, kTotal, device) != cudaSuccess) return limit;
    return int(std::min(total / (shared_bytes + kReserved), int64_t(limit)));
}

// Call launch(element) with an element of the dtype.
template <class Launch>
cudaError_t for_dtype(DType dtype, const Launch& launch) {
    switch (dtype) {
        case DType::float16:
            return launch(Half());
        case DType::bfloat16:
            return launch(BFloat16());
        default:
            return launch(float());
    }
}

// Kernels for any size, layout and dtype, without tensor cores.
namespace simt {
cudaError_t attn_fwd(const FwdParams&, cudaStream_t);
cudaError_t attn_bwd_dq(const BwdParams&, cudaStream_t);
cudaError_t attn_bwd_dkdv(const BwdParams&, cudaStream_t);
}  // namespace simt

// Kernels for tensor cores: float16 and bfloat16, the usual head_dims, up to 80 keys, and rows at
// multiples of 16 bytes.
namespace mma {

// Call visit(dim) with the head_dim as a type whose `value` is a constant.
template <class Visit>
auto for_head_dim(int64_t head_dim, const Visit& visit) {
    switch (head_dim) {
        case 40:
            return visit(std::integral_constant<int, 40>());
        case 64:
            return visit(std::integral_constant<int, 64>());
        case 80:
            return visit(std::integral_constant<int, 80>());
        default:
            return visit(std::integral_constant<int, 160>());
    }
}

// Call launch(dim, element, with_reference); dim and with_reference are types of constants.
template <class Launch>
cudaError_t for_kernel(const Problem& p, bool with_reference, const Launch& launch) {
    return for_head_dim(p.head_dim, [&](auto dim) {
        const auto for_reference = [&](auto element) {
            return with_reference ? launch(dim, element, std::true_type())
                                  : launch(dim, element, std::false_type());
        };
        return p.dtype == DType::float16 ? for_reference(Half()) : for_reference(BFloat16());
    });
}

// Maximum number of keys, to which a tile is padded.
constexpr int kKeys = 80;
// rows_per_cta is a multiple of this in all kernels.
constexpr int kBlockRows = 64;

// Resident blocks of a multiprocessor, limited by registers and shared memory.
int fwd_ctas_per_sm(int64_t head_dim);
int bwd_ctas_per_sm(int64_t head_dim);
constexpr int bwd_dq_ctas_per_sm(int64_t head_dim) { return head_dim > 80 ? 1 : 2; }
constexpr int bwd_dkdv_ctas_per_sm(int64_t head_dim) { return head_dim > 80 ? 1 : 2; }

// Whether attn_bwd computes dQ, dK_t and dV_t of a supported call. Registers hold the sums of only
// two key-side gradients, and head_dim 160 needs the shared memory of sm_80 or sm_90. Other calls
// take attn_bwd_dq, then attn_bwd_dkdv.
bool fuses_dq(const BackwardCall& call);

cudaError_t attn_fwd(const FwdParams&, cudaStream_t);
cudaError_t attn_bwd(const BwdParams&, cudaStream_t);
cudaError_t attn_bwd_dq(const BwdParams&, cudaStream_t);
cudaError_t attn_bwd_dkdv(const BwdParams&, cudaStream_t);

}  // namespace mma

cudaError_t reduce_loss(const ReduceLossParams&, cudaStream_t);
cudaError_t average_heads(const AverageHeadsParams&, cudaStream_t);
cudaError_t reduce_splits(const ReduceSplitsParams&, cudaStream_t);

}  // namespace sefi::cuda
