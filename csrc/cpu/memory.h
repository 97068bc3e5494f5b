// Memory that one call needs besides its inputs and results.
#pragma once

#include <cstddef>
#include <memory>

namespace sefi {

struct Free {
    size_t bytes = 0;
    void operator()(char* block) const;
};
using Block = std::unique_ptr<char, Free>;

inline size_t round_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Uninitialised, aligned to a cache line. What is freed is kept for the next call, up to 8 MiB in
// all: fresh pages cost the kernel more than the sums that are written there.
Block allocate(size_t bytes);

// Has the kernel provide the pages of results about to be written, all at once where it can: a fault
// for each page of new memory takes several times as long. Their contents stay as they are.
void fault_in(char* begin, char* end);

}  // namespace sefi
