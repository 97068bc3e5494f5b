// The emulated twin of csrc/cuda/start.h.
#pragma once

#include <cuda_runtime.h>

namespace sefi::cuda {

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared, cudaStream_t,
                  const Arguments& arguments) {
    const void* address = reinterpret_cast<const void*>(kernel);
    if (shared > 48 * 1024 && !emulation::allow_shared(address, shared)) {
        return cudaErrorInvalidValue;
    }
    const auto body = [&] { kernel(arguments); };
    return emulation::launch(address, grid, threads, shared, body) ? cudaSuccess
                                                                   : cudaErrorLaunchFailure;
}

// Kernels run one after the other here.
template <class Arguments>
cudaError_t start_early(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared,
                        cudaStream_t stream, const Arguments& arguments) {
    return start(kernel, grid, threads, shared, stream, arguments);
}

}  // namespace sefi::cuda
