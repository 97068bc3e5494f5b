// Scratch memory of a call.
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

// Uninitialized memory, aligned to a cache line. Up to 8 MiB of freed blocks are kept for later
// calls, because page faults of new memory take longer than the sums that are written there.
Block allocate(size_t bytes);

// Populate the pages of results before they are written, if the operating system can do it in one
// call: one fault per page takes several times as long. Contents do not change.
void prefault(char* begin, char* end);

}  // namespace sefi
