// The Python module sefi_fast._cuda. It takes device addresses, sizes, strides and a stream.
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "python_call.h"

#ifndef SEFI_CUDA_TARGETS
#error "SEFI_CUDA_TARGETS is a string of the compiled targets, like \"sm_80,sm_90a,compute_80\""
#endif
#ifndef SEFI_CUDA_VERSION
#error "SEFI_CUDA_VERSION is the version of the CUDA runtime, major * 1000 + minor * 10"
#endif

namespace {

void throw_failure(const char* failure) {
    if (failure) throw std::runtime_error(failure);
}

void forward(const sefi::ForwardCall& call, int64_t scratch, int num_sms, int64_t stream) {
    using sefi::python::pointer;
    throw_failure(
        sefi::cuda::forward(call, pointer<void>(scratch), num_sms, pointer<void>(stream)));
}

void backward(const sefi::BackwardCall& call, int64_t scratch, int num_sms, int64_t stream) {
    using sefi::python::pointer;
    throw_failure(
        sefi::cuda::backward(call, pointer<void>(scratch), num_sms, pointer<void>(stream)));
}

std::vector<std::string> architectures() {
    std::vector<std::string> names;
    std::istringstream list(SEFI_CUDA_TARGETS);
    for (std::string name; std::getline(list, name, ',');) names.push_back(name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    using namespace sefi::python;
    module.doc() = "CUDA kernels of sefi_fast: fused cross-attention on NVIDIA devices.";

    module.def("forward", bind_forward(&forward),
               "Enqueue the kernels that write output, subject loss and attn_probs.");
    module.def("backward", bind_backward(&backward),
               "Enqueue the kernels that write the gradients whose address is not 0.");
    module.def("forward_scratch", bind_forward(&sefi::cuda::forward_scratch),
               "Bytes of scratch memory of a forward call.");
    module.def("backward_scratch", bind_backward(&sefi::cuda::backward_scratch),
               "Bytes of scratch memory of a backward call.");

    module.def("architectures", &architectures,
               "Compiled targets: sm_80 is machine code, compute_80 is PTX.");
    module.def(
        "runtime_version", [] { return SEFI_CUDA_VERSION; },
        "Version of the linked CUDA runtime: major * 1000 + minor * 10.");
    module.def(
        "driver_version", &sefi::cuda::driver_version,
        "Newest CUDA version that the driver supports, in the same form; 0 without a driver.");
}
