// Runs numbered pieces of work on several threads.
#pragma once

#include <cstdint>
#include <functional>

namespace sefi {

// Calls work(index, thread) for every index below count, each once, in no fixed order; thread is
// below `threads` and never the same in two calls at one time. A thread takes up to `neighbours`
// indices in a row, fewer towards the end. Runs on the calling thread alone where one thread is
// asked for or there is one piece. Rethrows the first exception of work.
void parallel_for(int64_t count, int threads, int64_t neighbours,
                  const std::function<void(int64_t, int)>& work);

// Whose threads: "openmp" (those of the run-time that the process already holds) or "own".
const char* thread_source();

}  // namespace sefi
