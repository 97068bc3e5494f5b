// The Python module sefi_fast._cuda: device addresses, sizes and strides in, kernels on a stream
// out.
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "python_call.h"

#ifndef SEFI_CUDA_TARGETS
#error "SEFI_CUDA_TARGETS is a string of what the kernels are compiled for: sm_80,sm_90a,compute_80"
#endif
#ifndef SEFI_CUDA_VERSION
#error "SEFI_CUDA_VERSION is the CUDA runtime's version, major * 1000 + minor * 10"
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

    module.def("forward", of_forward_call(&forward),
               "Enqueues the kernels that write output, subject loss and attn_probs.");
    module.def("backward", of_backward_call(&backward),
               "Enqueues the kernels that write the gradients whose address is not 0.");
    module.def("forward_scratch", of_forward_call(&sefi::cuda::forward_scratch),
               "Bytes of device memory that the same forward call wants as scratch.");
    module.def("backward_scratch", of_backward_call(&sefi::cuda::backward_scratch),
               "Bytes of device memory that the same backward call wants as scratch.");

    module.def("architectures", &architectures,
               "What the kernels are compiled for: sm_80 is machine code, compute_80 is PTX.");
    module.def(
        "runtime_version", [] { return SEFI_CUDA_VERSION; },
        "Version of the CUDA runtime inside: major * 1000 + minor * 10.");
    module.def("driver_version", &sefi::cuda::driver_version,
               "Newest CUDA that the driver knows, counted alike; 0 without a driver.");
}
