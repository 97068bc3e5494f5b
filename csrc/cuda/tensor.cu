// Which calls the matrix units' kernels take.
#include "cuda/tensor.h"

namespace sefi::cuda::tensor {
namespace {

// Whether every row of a head begins at a multiple of 16 bytes, and 32 bits count the bytes from
// one to the next.
bool aligned(const Problem& p, const View& view, int64_t batch, int64_t rows) {
    const auto even = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
           even(view.shared ? 1 : batch, view.batch) && even(p.heads, view.head) &&
           even(rows, view.row) && view.row < (int64_t(1) << 31);
}

bool usual(const Problem& p) {
    const int64_t d = p.head_dim;
    return p.dtype != DType::float32 && (d == 40 || d == 64 || d == 80 || d == 160) &&
           p.keys <= 80 && p.queries <= (int64_t(1) << 30) && p.scale >= 0.0f &&
           aligned(p, p.query, p.batch, p.queries) && aligned(p, p.key, p.batch, p.keys) &&
           aligned(p, p.value, p.batch, p.keys) &&
           aligned(p, p.reference_key, p.batch, p.keys);
}

}  // namespace

bool takes(const ForwardCall& call) {
    return usual(call) && aligned(call, call.output, call.batch, call.queries);
}

bool takes(const BackwardCall& call) {
    return usual(call) && aligned(call, call.grad_output, call.batch, call.queries) &&
           aligned(call, call.grad_query, call.batch, call.queries);
}

bool writes(const BackwardCall& call, const View& gradient) {
    return aligned(call, gradient, call.batch, call.keys);
}

}  // namespace sefi::cuda::tensor
