// Launch of a kernel that takes one struct of parameters.
#pragma once

#include <cuda_runtime.h>

#include "cuda/api.h"

namespace sefi::cuda {

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared,
                   cudaStream_t stream, const Params& params) {
    if (shared > 48 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) {
            // Clears the error, which the next launch of any library would report.
            cudaGetLastError();
            return error;
        }
    }
    kernel<<<grid, threads, shared, stream>>>(params);
    return cudaGetLastError();
}

// Programmatic dependent launch, for a kernel that begins with wait_for_dependency(): from sm_90 on
// it is set up while the previous kernel of the stream still runs.
template <class Params>
cudaError_t launch_pdl(void (*kernel)(Params), dim3 grid, int threads, size_t shared,
                       cudaStream_t stream, const Params& params) {
    cudaFuncAttributes attributes = {};
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return error;
    }
    cudaLaunchAttribute serialization = {};
    serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    serialization.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &serialization;
    // Code compiled for older architectures has no wait, and drivers before CUDA 12.3 do not
    // capture such launches in graphs.
    static const bool supported_in_graphs = driver_version() >= 12030;
    config.numAttrs = attributes.ptxVersion >= 90 && supported_in_graphs ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, params);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

}  // namespace sefi::cuda
