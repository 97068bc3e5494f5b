// Forward of whole tensors: units of query rows, and the subject loss's sum in a fixed order.
#include <algorithm>
#include <vector>

#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/threads.h"

namespace sefi {

size_t forward(const ForwardCall& call, int threads) {
    const Kernels& isa = kernels();
    // Maps averaged over the heads are summed in place: one unit takes all heads of its rows.
    const int64_t heads = call.probs_count && !call.probs_all_heads ? call.heads : 1;
    // Long enough that packing the keys costs little, short enough to keep many threads busy.
    const int64_t rows = heads == 1 ? 512 : 256;
    const int64_t chunks = (call.queries + rows - 1) / rows;
    const int64_t units = call.batch * (call.heads / heads) * chunks;
    const size_t scratch = round_to_line(isa.forward_scratch(call));
    threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(units, 1)));
    const Block block = allocate(scratch * size_t(threads));
    std::vector<double> shares(size_t(call.batch * call.heads * chunks));
    // Heads run fastest, and one thread takes those of the same rows, which lie side by side in memory
    // and share cache lines where a row is no whole number of them.
    const int64_t groups = call.heads / heads;
    parallel_for(units, threads, groups, [&](int64_t unit, int thread) {
        const int64_t chunk = unit / groups % chunks, b = unit / groups / chunks;
        const int64_t end = std::min(call.queries, (chunk + 1) * rows);
        if (unit % groups == 0) {
            fault_in(call.output.at(call.dtype, b, 0, chunk * rows),
                     call.output.at(call.dtype, b, 0, end));
        }
        for (int64_t h = unit % groups * heads, last = h + heads; h < last; ++h) {
            shares[size_t((b * call.heads + h) * chunks + chunk)] = isa.forward(
                call, b, h, chunk * rows, end, block.get() + scratch * size_t(thread));
        }
    });
    const size_t each = size_t(call.heads * chunks);
    for (int64_t b = 0; b < call.batch; ++b) {
        double total = 0.0;
        for (size_t i = 0; i < each; ++i) total += shares[size_t(b) * each + i];
        call.subject_loss[b] = float(total / double(std::max<int64_t>(call.heads, 1)));
    }
    return scratch * size_t(threads) + shares.size() * sizeof(double);
}

}  // namespace sefi
