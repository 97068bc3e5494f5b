// Starts a kernel that takes one struct of arguments.
#pragma once

#include <cuda_runtime.h>

#include "cuda/calls.h"

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

// The same for a kernel that begins with wait_for_previous(): from 9.0 on it may be on its way to
// the multiprocessors while the one before it in the stream still runs.
template <class Arguments>
cudaError_t start_early(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared,
                        cudaStream_t stream, const Arguments& arguments) {
    cudaFuncAttributes known = {};
    cudaError_t error = cudaFuncGetAttributes(&known, kernel);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
    }
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &early;
    // Compiled for older devices a kernel does not wait, on whatever it runs; and drivers before
    // CUDA 12.3 do not capture such starts in graphs as what they are.
    static const bool known_to_graphs = driver_version() >= 12030;
    config.numAttrs = known.ptxVersion >= 90 && known_to_graphs ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, arguments);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

}  // namespace sefi::cuda
