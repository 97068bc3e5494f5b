// Forward and backward of whole tensors: units of query rows, and sums over units in a fixed order.
#include <algorithm>
#include <vector>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace sefi {

size_t forward(const ForwardCall& call, int threads) {
    const Kernels& isa = kernels(call.dtype);
    // Probabilities averaged over heads are summed in place, so one unit takes all heads of its
    // rows.
    const int64_t heads = call.probs_count && !call.probs_all_heads ? call.heads : 1;
    // Long enough to amortize packing the keys, short enough to keep many threads busy.
    const int64_t rows = heads == 1 ? 512 : 256;
    const int64_t chunks = (call.queries + rows - 1) / rows;
    const int64_t units = call.batch * (call.heads / heads) * chunks;
    const size_t scratch = round_to_line(isa.forward_scratch(call));
    threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(units, 1)));
    const Block block = allocate(scratch * size_t(threads));
    std::vector<double> losses(size_t(call.batch * call.heads * chunks));
    // The head index runs fastest and a thread takes all heads of some rows: they are adjacent in
    // memory and may share cache lines.
    const int64_t groups = call.heads / heads;
    parallel_for(units, threads, groups, [&](int64_t unit, int thread) {
        const int64_t chunk = unit / groups % chunks, b = unit / groups / chunks;
        const int64_t end = std::min(call.queries, (chunk + 1) * rows);
        if (unit % groups == 0) {
            prefault(call.output.at(call.dtype, b, 0, chunk * rows),
                     call.output.at(call.dtype, b, 0, end));
        }
        for (int64_t h = unit % groups * heads, last = h + heads; h < last; ++h) {
            losses[size_t((b * call.heads + h) * chunks + chunk)] =
                isa.forward(call, b, h, chunk * rows, end, block.get() + scratch * size_t(thread));
        }
    });
    const size_t each = size_t(call.heads * chunks);
    for (int64_t b = 0; b < call.batch; ++b) {
        double total = 0.0;
        for (size_t i = 0; i < each; ++i) total += losses[size_t(b) * each + i];
        call.subject_loss[b] = float(total / double(std::max<int64_t>(call.heads, 1)));
    }
    return scratch * size_t(threads) + losses.size() * sizeof(double);
}

namespace {

struct Shape {
    int64_t batch, heads, keys, head_dim, chunks, rows;
    DType dtype;
};

// One of the three key-side gradients. If several units contribute to an entry (chunks of queries,
// or samples that share a key), they store partial sums.
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
        // Plus a cache line, because store_row may read past the last row.
        bytes = size_t(4 * s.batch * s.heads * s.chunks * s.keys * s.head_dim + 64);
        partials = allocate(bytes);
    }

    float* partial(const Shape& s, int64_t b, int64_t h, int64_t chunk) const {
        const int64_t place =
            shared ? (h * s.batch + b) * s.chunks + chunk : (b * s.heads + h) * s.chunks + chunk;
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
    // Enough units for many threads, but each chunk needs partial sums of 2 * keys * head_dim: all
    // of them take less than a quarter of an attention matrix.
    constexpr int64_t kUnits = 32;
    const int64_t entries = std::max<int64_t>(call.batch * call.heads, 1);
    const int64_t most = std::max<int64_t>(call.queries / (8 * call.head_dim), 1);
    const int64_t chunks = std::clamp<int64_t>((kUnits + entries - 1) / entries, 1, most);
    const int64_t rows = ((call.queries + chunks - 1) / chunks + 63) / 64 * 64;
    return {call.batch, call.heads, call.keys, call.head_dim, (call.queries + rows - 1) / rows,
            rows,       call.dtype};
}

}  // namespace

size_t backward(const BackwardCall& call, int threads) {
    const Kernels& isa = kernels(call.dtype);
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
    // As in the forward pass, a thread takes all heads of some rows.
    parallel_for(units, threads, shape.heads, [&](int64_t unit, int thread) {
        const int64_t h = unit % shape.heads, chunk = unit / shape.heads % shape.chunks;
        const int64_t b = unit / shape.heads / shape.chunks;
        const KeyGradients targets{reductions[0].target(shape, b, h, chunk),
                                   reductions[1].target(shape, b, h, chunk),
                                   reductions[2].target(shape, b, h, chunk)};
        const int64_t begin = chunk * shape.rows;
        const int64_t end = std::min(call.queries, begin + shape.rows);
        if (h == 0 && call.grad_query.data) {
            prefault(call.grad_query.at(call.dtype, b, 0, begin),
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
