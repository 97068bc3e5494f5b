// Entry points of the CUDA library. Pointers inside the calls are device pointers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace sefi::cuda {

// The newest CUDA version that the driver supports, major * 1000 + minor * 10; 0 without a driver.
int driver_version();

// Bytes of scratch memory of a call. The caller allocates them uninitialized and 256-byte aligned;
// for 0 bytes `scratch` may be null. The current device must be the same in the call itself,
// because the number of splits depends on its shared memory.
int64_t forward_scratch(const ForwardCall& call, int num_sms);
int64_t backward_scratch(const BackwardCall& call, int num_sms);

// Launch all kernels on `stream` (a cudaStream_t) of the current device, without synchronization or
// allocation; the same call launches the same kernels, so a CUDA graph can capture it. Results
// repeat bit for bit. Return nullptr, or one sentence about the failure.
const char* forward(const ForwardCall& call, void* scratch, int num_sms, void* stream);
const char* backward(const BackwardCall& call, void* scratch, int num_sms, void* stream);

}  // namespace sefi::cuda
