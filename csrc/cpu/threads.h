// A parallel loop over numbered pieces of work.
#pragma once

#include <cstdint>
#include <functional>

namespace sefi {

// Call work(index, thread) once for every index below count, in no fixed order. `thread` is below
// `threads` and differs between simultaneous calls. A thread takes up to max_run consecutive
// indices, fewer towards the end. One thread or one index runs on the calling thread. Rethrows the
// first exception of work.
void parallel_for(int64_t count, int threads, int64_t max_run,
                  const std::function<void(int64_t, int)>& work);

// "openmp" for the threads of the OpenMP runtime that the process has loaded, or "own".
const char* thread_source();

}  // namespace sefi
