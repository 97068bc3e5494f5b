#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <new>
#include <vector>

namespace sefi {
namespace {

class Kept {
public:
    // A kept block of just that size, as the same layer asks for again and again, or null.
    char* take(size_t bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock) return nullptr;
        for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
            if (entry->bytes != bytes) continue;
            char* block = entry->block;
            total_ -= bytes;
            entries_.erase(std::next(entry).base());
            return block;
        }
        return nullptr;
    }

    // Makes room by freeing the oldest.
    void give(char* block, size_t bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock || bytes > kMost) return std::free(block);
        while (total_ + bytes > kMost) {
            total_ -= entries_.front().bytes;
            std::free(entries_.front().block);
            entries_.erase(entries_.begin());
        }
        entries_.push_back({block, bytes});
        total_ += bytes;
    }

private:
    static constexpr size_t kMost = size_t(8) << 20;
    struct Entry {
        char* block;
        size_t bytes;
    };
    // Only ever tried: whoever finds it taken, as a forked child may for ever, does without.
    std::mutex mutex_;
    std::vector<Entry> entries_;
    size_t total_ = 0;
};

// Never destroyed: a thread may still free a block at the end of the process.
Kept& kept() {
    static Kept* const all = new Kept;
    return *all;
}

}  // namespace

void Free::operator()(char* block) const { kept().give(block, bytes); }

void fault_in(char* begin, char* end) {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
    if (last <= first) return;
    // Memory that was written before has its last page, and the others with it.
    unsigned char present = 1;
    if (mincore(reinterpret_cast<void*>(last - page), page, &present) != 0 || present & 1) return;
    // A kernel before 5.14 refuses, and pages then come one by one as ever.
    madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite);
#else
    (void)begin, (void)end;
#endif
}

Block allocate(size_t bytes) {
    if (bytes == 0) return Block();
    bytes = round_to_line(bytes);
    char* block = kept().take(bytes);
    if (!block) block = static_cast<char*>(std::aligned_alloc(64, bytes));
    if (!block) throw std::bad_alloc();
    return Block(block, Free{bytes});
}

}  // namespace sefi
