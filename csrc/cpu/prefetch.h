// Prefetch of the rows that the next steps use, a few at a time between blocks of a product.
//
// The rows of a head are a few cache lines each and a whole token apart, a pattern that hardware
// prefetchers miss. Prefetched all at once, they would delay the loads of the current step.
#pragma once

#include "cpu/simd.h"

namespace sefi {
namespace SEFI_ISA {

class Prefetcher {
public:
    // Add the rows [n, n + count) of one head; an absent tensor has none.
    void add(const View& view, DType dtype, int64_t b, int64_t h, int64_t n, int64_t count,
             int64_t head_dim) {
        if (!view.data || count <= 0) return;
        spans_[last_++] = {view.at(dtype, b, h, n), item_size(dtype) * view.row, count,
                           item_size(dtype) * head_dim};
    }

    void step() {
        constexpr int64_t kRows = 4;
        for (int64_t i = 0; i < kRows && first_ < last_; ++i) {
            Span& span = spans_[first_];
            const char* last = span.row + span.bytes - 1;
            for (const char* at = span.row; at < last; at += 64) __builtin_prefetch(at, 0, 2);
            if (reinterpret_cast<uintptr_t>(span.row) % 64) __builtin_prefetch(last, 0, 2);
            span.row += span.stride;
            if (--span.count == 0) ++first_;
        }
    }

private:
    struct Span {
        const char* row;
        int64_t stride, count, bytes;
    };
    Span spans_[3];
    int first_ = 0, last_ = 0;
};

}  // namespace SEFI_ISA
}  // namespace sefi
