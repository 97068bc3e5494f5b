// Tiles of rows on their way from global to shared memory, as groups of asynchronous copies.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

// kRows rows of one head by kThreads threads: neighbours take neighbouring 16-byte chunks of a row,
// as many as a power of two allows, and one chunk each of what is left.
template <int D, class E, int kRows, int kThreads>
class RowCopies {
    static constexpr int kEights = Layout<D>::kEights, kStride = Layout<D>::kStride;
    static constexpr int kLanes = kEights >= 16 ? 16 : kEights >= 8 ? 8 : 4;
    static constexpr int kRest = kEights - kLanes, kStep = kThreads / kLanes;
    static_assert(kRest * kRows <= kThreads, "one chunk of the rest a thread");

public:
    SEFI_DEVICE RowCopies(const View& view, int64_t b, int64_t h)
        : head_(head_of<E>(view, b, h)), stride_(view.row) {}

    // Rows first, first + 1, ...; zeros from row `end` on. The caller closes the group.
    SEFI_DEVICE void start(int64_t first, int64_t end, uint32_t to) const {
        const int inside = int(min(end - first, int64_t(kRows)));
        const E* const rows = head_ + first * stride_;
        const auto copy = [&](int row, int eight) {
            // Nothing is read where a row is not inside, but the address must be a good one.
            const E* const from = rows + (row < inside ? row : 0) * stride_ + 8 * eight;
            copy_async(to + uint32_t(row * kStride + 16 * eight), from, row < inside);
        };
        const int thread = int(threadIdx.x);
#pragma unroll
        for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
            const int row = thread / kLanes + i * kStep;
            if (kRows % kStep == 0 || row < kRows) copy(row, thread % kLanes);
        }
        if constexpr (kRest > 0) {
            if (thread < kRest * kRows) copy(thread / kRest, kLanes + thread % kRest);
        }
    }

private:
    const E* head_;
    int64_t stride_;
};

}  // namespace sefi::cuda::tensor
