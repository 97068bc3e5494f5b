// Tiles of rows on their way from global to shared memory, as groups of asynchronous copies.
#pragma once

#include "cuda/tile.h"

namespace sefi::cuda::tensor {

// kRows rows of one head by kThreads threads.
template <int D, class E, int kRows, int kThreads>
class RowCopies {
public:
    SEFI_DEVICE RowCopies(const View& view, int64_t b, int64_t h)
        : head_(Rows::of<E>(view, b, h)) {}

    // Rows first, first + 1, ...; zeros from row `end` on. The caller closes the group.
    SEFI_DEVICE void start(int first, int end, uint32_t to) const {
        Chunks<D, kRows, kThreads>::each([&](int, int row, int eight) {
            // Nothing is read where a row is not inside, but the address must be a good one.
            const char* const from = head_[min(first + row, end - 1)] + 16 * eight;
            copy_async(to + uint32_t(row * Layout<D>::kStride + 16 * eight), from,
                       first + row < end);
        });
    }

private:
    Rows head_;
};

}  // namespace sefi::cuda::tensor
