// A parallel loop over numbered pieces of work.
//
// The OpenMP workers of PyTorch spin for a while after each operator, and a second pool would
// compete with them for the cores. So the OpenMP runtime of the process is found by name, without
// linking to it. Without one, and in a forked child, where its threads do not exist, a pool of our
// own is used.
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

// The entry point of GNU's OpenMP runtime. Those of LLVM and Intel have it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

struct Job {
    const std::function<void(int64_t, int)>& work;
    const int64_t count, max_run;
    const int seats;
    std::atomic<int64_t> next{0};
    std::atomic<int> threads{0};
    std::mutex failure_mutex;
    std::exception_ptr failure;

    // Take half of the thread's share of the remaining indices, so that all threads end together.
    bool take(int64_t& first, int64_t& last) {
        first = next.load();
        do {
            if (first >= count) return false;
            const int64_t share = (count - first) / (2 * seats);
            last = first + std::clamp<int64_t>(share, 1, max_run);
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
            const std::lock_guard<std::mutex> lock(failure_mutex);
            if (!failure) failure = std::current_exception();
        }
    }
};

// Threads that sleep between jobs. One job runs at a time; other callers wait.
class Pool {
public:
    const pid_t owner = getpid();

    void run(Job& job, int threads) {
        const std::lock_guard<std::mutex> call(calls_);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (int(workers_.size()) < threads - 1) {
                    workers_.emplace_back([this] { serve(); });
                    workers_.back().detach();
                }
            } catch (const std::system_error&) {
                // The system refuses more threads; the existing ones do the work.
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

    std::mutex calls_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    Job* job_ = nullptr;
    int seats_ = 0, busy_ = 0;
};

// Never destroyed, because its threads may sleep in it at the end of the process. A forked child
// has none of the threads and makes its own pool, without a lock: a thread of the parent might hold
// it forever.
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

void parallel_for(int64_t count, int threads, int64_t max_run,
                  const std::function<void(int64_t, int)>& work) {
    threads = std::max(1, int(std::min<int64_t>(threads, count)));
    Job job{work, count, max_run, threads};
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
