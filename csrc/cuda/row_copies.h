// Tiles of rows on their way from global to shared memory, as groups of asynchronous copies.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

// kRows rows of one head by kThreads threads.
template <int D, class E, int kRows, int kThreads>
class RowCopies {
public:
    SEFI_DEVICE RowCopies(const View& view, int64_t b, int64_t h)
        : head_(head_of<E>(view, b, h)), stride_(view.row) {}

    // Rows first, first + 1, ...; zeros from row `end` on. The caller closes the group.
    SEFI_DEVICE void start(int64_t first, int64_t end, uint32_t to) const {
        const int inside = int(min(end - first, int64_t(kRows)));
        const E* const rows = head_ + first * stride_;
        Chunks<D, kRows, kThreads>::each([&](int, int row, int eight) {
            // Nothing is read where a row is not inside, but the address must be a good one.
            const E* const from = rows + (row < inside ? row : 0) * stride_ + 8 * eight;
            copy_async(to + uint32_t(row * Layout<D>::kStride + 16 * eight), from, row < inside);
        });
    }

private:
    const E* head_;
    int64_t stride_;
};

}  // namespace sefi::cuda::tensor
