// Memory that one call needs besides its inputs and results.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace sefi {

struct Free {
    void operator()(char* block) const { std::free(block); }
};
using Block = std::unique_ptr<char, Free>;

inline size_t round_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Uninitialised, aligned to a cache line.
inline Block allocate(size_t bytes) {
    if (bytes == 0) return Block();
    Block block(static_cast<char*>(std::aligned_alloc(64, round_to_line(bytes))));
    if (!block) throw std::bad_alloc();
    return block;
}

}  // namespace sefi
