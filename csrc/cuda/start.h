// Starts a kernel that takes one struct of arguments.
#pragma once

#include <cuda_runtime.h>

namespace sefi::cuda {

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared,
                  cudaStream_t stream, const Arguments& arguments) {
    if (shared > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) {
            // Else the next launch, of anybody, would report it.
            cudaGetLastError();
            return error;
        }
    }
    kernel<<<grid, threads, shared, stream>>>(arguments);
    return cudaGetLastError();
}

}  // namespace sefi::cuda
