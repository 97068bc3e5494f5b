// Runs numbered pieces of work on several threads.
//
// PyTorch's OpenMP workers spin for a while after each of its operators. A second pool beside them
// would fight them for the cores, so the run-time that the process holds already is borrowed by
// name, without linking to it. Without one (or in a forked child, where OpenMP's threads are gone)
// a pool of our own does the work.
#include "cpu/threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace sefi {
namespace {

// The entry point of GNU's OpenMP run-time, which LLVM's and Intel's have too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

struct Job {
    const std::function<void(int64_t, int)>& work;
    const int64_t count, neighbours;
    const int seats;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};
    std::mutex failed;
    std::exception_ptr failure;

    // The next indices for one thread: half of its share of what is left, so that all end together.
    bool take(int64_t& first, int64_t& last) {
        first = next.load();
        do {
            if (first >= count) return false;
            const int64_t share = (count - first) / (2 * seats);
            last = first + std::clamp<int64_t>(share, 1, neighbours);
        } while (!next.compare_exchange_weak(first, last));
        return true;
    }

    void run() noexcept {
        const int thread = threads.fetch_add(1);
        try {
            for (int64_t i, last; take(i, last);) {
                for (; i < last; ++i) work(i, thread);
            }
        } catch (...) {
            next.store(count);
            const std::lock_guard<std::mutex> lock(failed);
            if (!failure) failure = std::current_exception();
        }
    }
};

// Threads that sleep between jobs. One job at a time; a second caller waits its turn.
class Pool {
public:
    const pid_t owner = getpid();

    void run(Job& job, int threads) {
        const std::lock_guard<std::mutex> turn(turn_);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (int(workers_.size()) < threads - 1) {
                    workers_.emplace_back([this] { serve(); });
                    workers_.back().detach();
                }
            } catch (const std::system_error&) {
                // The system gives no more threads: those that there are do the work.
            }
            job_ = &job;
            seats_ = std::min(threads - 1, int(workers_.size()));
        }
        wake_.notify_all();
        job.run();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return job_ && seats_ > 0; });
            Job* job = job_;
            --seats_;
            ++busy_;
            lock.unlock();
            job->run();
            lock.lock();
            --busy_;
            if (busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int seats_ = 0, busy_ = 0;
};

// Never destroyed: at the end of the process its threads may still sleep in it. A forked child has
// none of its parent's threads and makes a pool of its own; a lock here might be held for ever in it,
// by a thread of the parent's.
Pool& own_pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* pool = current.load();
    while (!pool || pool->owner != getpid()) {
        Pool* const made = new Pool;
        if (current.compare_exchange_strong(pool, made)) return *made;
        delete made;
    }
    return *pool;
}

const pid_t loader = getpid();

GompParallel openmp() {
    if (loader != getpid()) return nullptr;
    static const GompParallel found = find_openmp();
    return found;
}

}  // namespace

void parallel_for(int64_t count, int threads, int64_t neighbours,
                  const std::function<void(int64_t, int)>& work) {
    threads = std::max(1, int(std::min<int64_t>(threads, count)));
    Job job{work, count, neighbours, threads};
    if (threads <= 1) {
        job.run();
    } else if (const GompParallel parallel = openmp()) {
        parallel([](void* data) { static_cast<Job*>(data)->run(); }, &job, unsigned(threads), 0);
    } else {
        own_pool().run(job, threads);
    }
    if (job.failure) std::rethrow_exception(job.failure);
}

const char* thread_source() { return openmp() ? "openmp" : "own"; }

}  // namespace sefi
