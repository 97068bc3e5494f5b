// Cache of freed scratch memory, and population of pages.
#include "cpu/scratch.h"

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

class BlockCache {
public:
    // A cached block of exactly this size, or null. The same layer repeats its sizes.
    char* pop(size_t bytes) {
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

    // Add a block; the oldest ones are freed to make room.
    void push(char* block, size_t bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock || bytes > kMaxBytes) return std::free(block);
        while (total_ + bytes > kMaxBytes) {
            total_ -= entries_.front().bytes;
            std::free(entries_.front().block);
            entries_.erase(entries_.begin());
        }
        entries_.push_back({block, bytes});
        total_ += bytes;
    }

private:
    static constexpr size_t kMaxBytes = size_t(8) << 20;
    struct Entry {
        char* block;
        size_t bytes;
    };
    // Only try_lock: in a forked child the lock may stay taken forever. Without it nothing is
    // cached.
    std::mutex mutex_;
    std::vector<Entry> entries_;
    size_t total_ = 0;
};

// Never destroyed: a thread may still free a block at the end of the process.
BlockCache& block_cache() {
    static BlockCache* const all = new BlockCache;
    return *all;
}

}  // namespace

void Free::operator()(char* block) const { block_cache().push(block, bytes); }

void prefault(char* begin, char* end) {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, missing in older headers
    static const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
    const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
    if (last <= first) return;
    // If the last page is present, all were written before.
    unsigned char present = 1;
    if (mincore(reinterpret_cast<void*>(last - page), page, &present) != 0 || present & 1) return;
    // Linux before 5.14 returns an error; pages are then populated one by one.
    madvise(reinterpret_cast<void*>(first), last - first, kPopulateWrite);
#else
    (void)begin, (void)end;
#endif
}

Block allocate(size_t bytes) {
    if (bytes == 0) return Block();
    bytes = round_to_line(bytes);
    char* block = block_cache().pop(bytes);
    if (!block) block = static_cast<char*>(std::aligned_alloc(64, bytes));
    if (!block) throw std::bad_alloc();
    return Block(block, Free{bytes});
}

}  // namespace sefi
