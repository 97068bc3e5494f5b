// The entry points of the CUDA device side. Pointers inside the calls are device pointers.
#pragma once

#include <cstdint>

#include "problem.h"

namespace sefi::cuda {

// The newest CUDA that the driver knows, major * 1000 + minor * 10; 0 where there is no driver.
int driver_version();

// Bytes of device memory that a call needs beside its results (partial sums of the subject loss and of
// the maps; row statistics and partial sums of the key-side gradients). The caller hands them over
// uninitialised and 256-byte aligned; 0 means that `scratch` may be null. The device that is current
// here must be so when the call is made: how its rows are cut depends on its shared memory.
int64_t forward_scratch(const ForwardCall& call, int multiprocessors);
int64_t backward_scratch(const BackwardCall& call, int multiprocessors);

// Launches everything on `stream` (a cudaStream_t) of the current device: no synchronisation, no
// allocation, and the same kernels for the same call, so that a CUDA graph can capture it. Results
// are the same bits every time. Returns nullptr, or one sentence that says what failed.
const char* forward(const ForwardCall& call, void* scratch, int multiprocessors, void* stream);
const char* backward(const BackwardCall& call, void* scratch, int multiprocessors, void* stream);

}  // namespace sefi::cuda
