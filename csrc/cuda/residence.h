// How many blocks a multiprocessor holds at once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/start.h"

namespace sefi::cuda {

// Of blocks of `bytes` of shared memory, at most `most`.
inline int fitting(int64_t bytes, int most) {
    constexpr int kReserved = 1024;  // by the driver, for each block
    int device = 0, all = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return most;
    constexpr cudaDeviceAttr kAll = cudaDevAttrMaxSharedMemoryPerMultiprocessor;
    if (cudaDeviceGetAttribute(&all, kAll, device) != cudaSuccess) return most;
    return int(std::min(all / (bytes + kReserved), int64_t(most)));
}

}  // namespace sefi::cuda
