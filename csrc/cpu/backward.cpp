// Backward of whole tensors: units of query rows, and the key-side gradients' sums in a fixed order.
#include <algorithm>

#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace sefi {
namespace {

struct Shape {
    int64_t batch, heads, keys, head_dim, chunks, rows;
    DType dtype;
};

// One of the three key-side gradients. A single unit for each of its entries writes the result;
// several (query chunks, or samples that share one key) leave partial sums.
struct Reduction {
    View result;
    bool shared = false;
    int64_t parts = 1;
    Block partials;
    size_t bytes = 0;

    Reduction(const Shape& s, const View& gradient, const View& input) : result(gradient) {
        shared = input.shared;
        parts = s.chunks * (shared ? s.batch : 1);
        if (!result.data || parts == 1) return;
        // And a cache line that store_row may read past the last row.
        bytes = size_t(4 * s.batch * s.heads * s.chunks * s.keys * s.head_dim + 64);
        partials = allocate(bytes);
    }

    float* partial(const Shape& s, int64_t b, int64_t h, int64_t chunk) const {
        const int64_t place = shared ? (h * s.batch + b) * s.chunks + chunk
                                     : (b * s.heads + h) * s.chunks + chunk;
        return reinterpret_cast<float*>(partials.get()) + place * s.keys * s.head_dim;
    }

    KeyGradient target(const Shape& s, int64_t b, int64_t h, int64_t chunk) const {
        if (!result.data) return {};
        if (parts == 1) return {result.at(s.dtype, shared ? 0 : b, h, 0), result.row, s.dtype};
        return {reinterpret_cast<char*>(partial(s, b, h, chunk)), s.head_dim, DType::float32};
    }

    void add(const Kernels& isa, const Shape& s, int64_t b, int64_t h) const {
        const int64_t entry = s.keys * s.head_dim;
        float* total = partial(s, b, h, 0);
        for (int64_t part = 1; part < parts; ++part) {
            const float* other = total + part * entry;
            for (int64_t i = 0; i < entry; ++i) total[i] += other[i];
        }
        for (int64_t m = 0; m < s.keys; ++m) {
            isa.store_row(total + m * s.head_dim, s.head_dim, 1.0f, result.at(s.dtype, b, h, m),
                          s.dtype);
        }
    }
};

Shape shape_of(const BackwardCall& call) {
    // Cut so that many threads find work, but every piece more is another partial of 2 M D: all of
    // them together stay below a quarter of one map of N M.
    constexpr int64_t kUnits = 32;
    const int64_t entries = std::max<int64_t>(call.batch * call.heads, 1);
    const int64_t most = std::max<int64_t>(call.queries / (8 * call.head_dim), 1);
    const int64_t chunks = std::clamp<int64_t>((kUnits + entries - 1) / entries, 1, most);
    const int64_t rows = ((call.queries + chunks - 1) / chunks + 63) / 64 * 64;
    return {call.batch, call.heads, call.keys, call.head_dim, (call.queries + rows - 1) / rows, rows,
            call.dtype};
}

}  // namespace

size_t backward(const BackwardCall& call, int threads) {
    const Kernels& isa = kernels();
    const Shape shape = shape_of(call);
    const Reduction reductions[3] = {
        {shape, call.grad_key, call.key},
        {shape, call.grad_value, call.value},
        {shape, call.grad_reference_key, call.reference_key},
    };
    const int64_t units = shape.batch * shape.heads * shape.chunks;
    const size_t scratch = round_to_line(isa.backward_scratch(call));
    threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(units, 1)));
    const Block block = allocate(scratch * size_t(threads));
    // As in the forward pass, a thread takes the heads of the same rows.
    parallel_for(units, threads, shape.heads, [&](int64_t unit, int thread) {
        const int64_t h = unit % shape.heads, chunk = unit / shape.heads % shape.chunks;
        const int64_t b = unit / shape.heads / shape.chunks;
        const KeyGradients targets{reductions[0].target(shape, b, h, chunk),
                                   reductions[1].target(shape, b, h, chunk),
                                   reductions[2].target(shape, b, h, chunk)};
        const int64_t begin = chunk * shape.rows;
        const int64_t end = std::min(call.queries, begin + shape.rows);
        if (h == 0 && call.grad_query.data) {
            fault_in(call.grad_query.at(call.dtype, b, 0, begin),
                     call.grad_query.at(call.dtype, b, 0, end));
        }
        isa.backward(call, b, h, begin, end, targets, block.get() + scratch * size_t(thread));
    });
    size_t used = scratch * size_t(threads);
    for (const Reduction& reduction : reductions) {
        if (!reduction.partials) continue;
        used += reduction.bytes;
        const int64_t samples = reduction.shared ? 1 : shape.batch;
        parallel_for(samples * shape.heads, threads, 1, [&](int64_t entry, int) {
            reduction.add(isa, shape, entry / shape.heads, entry % shape.heads);
        });
    }
    return used;
}

}  // namespace sefi
