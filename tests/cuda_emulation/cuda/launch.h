// The emulated csrc/cuda/launch.h.
#pragma once

#include <cuda_runtime.h>

namespace sefi::cuda {

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared, cudaStream_t,
                   const Params& params) {
    const void* address = reinterpret_cast<const void*>(kernel);
    if (shared > 48 * 1024 && !emulation::allow_shared(address, shared)) {
        return cudaErrorInvalidValue;
    }
    const auto body = [&] { kernel(params); };
    return emulation::launch(address, grid, threads, shared, body) ? cudaSuccess
                                                                   : cudaErrorLaunchFailure;
}

// Emulated kernels never overlap.
template <class Params>
cudaError_t launch_pdl(void (*kernel)(Params), dim3 grid, int threads, size_t shared,
                       cudaStream_t stream, const Params& params) {
    return launch(kernel, grid, threads, shared, stream, params);
}

}  // namespace sefi::cuda
