// The entry points: cuts the rows, lays out the scratch memory, picks and starts the kernels.
#include <algorithm>
#include <cmath>

#include "cuda/calls.h"
#include "cuda/kernels.h"
#include "cuda/tensor.h"

namespace sefi::cuda {
namespace {

constexpr int kSimpleBlocks = 4;
constexpr int64_t kSimpleRows = 16;

// Hands out 256-byte aligned pieces of one block; from a null block it only counts the bytes.
class Arena {
public:
    explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

    float* floats(int64_t count) {
        char* piece = block_ ? block_ + used_ : nullptr;
        used_ += (4 * count + 255) / 256 * 256;
        return reinterpret_cast<float*>(piece);
    }
    int64_t used() const { return used_; }

private:
    char* block_;
    int64_t used_ = 0;
};

// What a block takes besides its rows, in units of rows: the keys' loads above all. In the kernel of
// the keys each block also writes sums, which another kernel adds up if there are several.
constexpr double kStart = 0.5, kKeysStart = 2.0;

// Splits of the rows, each of a multiple of `unit` rows, that are expected to end first. A
// multiprocessor holds `resident` blocks at once, and one block more than all of them hold keeps
// most of the device waiting for it. So what counts is the turns that the blocks take together,
// times what one takes.
Cut cut_rows(const Problem& p, int multiprocessors, int resident, int64_t unit, double start) {
    constexpr float kLog2e = 1.44269504088896341f, kSmallest = 1e-30f;
    const int64_t units = (p.queries + unit - 1) / unit;
    const int64_t places = int64_t(resident) * std::max(multiprocessors, 1);
    double least = 0;
    Cut cut;
    // From all rows in one block down to one unit a block, past those that need as many blocks.
    for (int64_t units_a_block = units; units_a_block >= 1; --units_a_block) {
        const int64_t splits = (units + units_a_block - 1) / units_a_block;
        if (splits > 65535) break;
        units_a_block = (units + splits - 1) / splits;
        const int64_t turns = (p.batch * p.heads * splits + places - 1) / places;
        const double cost = double(turns) * (double(units_a_block) + start);
        if (splits == 1 || cost < least) {
            least = cost;
            cut.rows_a_block = units_a_block * unit;
            cut.splits = splits;
        }
    }
    // Hidden scores are -inf, and -inf times 0 would be NaN.
    cut.scale_log2 = std::max(std::fabs(p.scale) * kLog2e, kSmallest);
    cut.sign = p.scale < 0 ? -1.0f : 1.0f;
    return cut;
}

struct ForwardPlan {
    bool tensor;
    ForwardArguments arguments;
    int64_t bytes;

    ForwardPlan(const ForwardCall& call, void* scratch, int multiprocessors)
        : tensor(tensor::takes(call)) {
        Arena arena(scratch);
        arguments.call = call;
        arguments.cut =
            tensor ? cut_rows(call, multiprocessors, tensor::forward_blocks(call.head_dim),
                              tensor::kBlockRows, kStart)
                   : cut_rows(call, multiprocessors, kSimpleBlocks, kSimpleRows, kStart);
        const int64_t heads = call.batch * call.heads;
        if (call.reference_key.data) {
            arguments.partials = arena.floats(heads * arguments.cut.splits);
        }
        if (call.probs_count) {
            arguments.attn_probs = call.probs_all_heads
                                 ? call.attn_probs
                                 : arena.floats(heads * call.probs_count * call.queries);
        }
        bytes = arena.used();
    }
};

struct BackwardPlan {
    bool tensor, one_pass;
    BackwardArguments query, key_value;
    int64_t bytes;

    BackwardPlan(const BackwardCall& call, void* scratch, int multiprocessors)
        : tensor(tensor::takes(call)), one_pass(tensor && tensor::in_one_pass(call)) {
        Arena arena(scratch);
        query.call = call;
        query.with_reference = call.with_reference();
        query.reference_grad = call.reference_grad && call.with_reference();
        query.map_share = call.probs_all_heads ? 1.0f : 1.0f / float(call.heads);
        // Whole tiles, so that a tile's statistics are read without a look at the end.
        query.padded_rows = (call.queries + tensor::kBlockRows - 1) / tensor::kBlockRows;
        query.padded_rows *= tensor::kBlockRows;
        if (!one_pass) {
            query.statistics =
                arena.floats(call.batch * call.heads * kStatistics * query.padded_rows);
        }
        key_value = query;
        if (one_pass) {
            key_value.cut = cut_rows(call, multiprocessors, tensor::backward_blocks(call.head_dim),
                                     tensor::kBlockRows, kKeysStart);
        } else if (tensor) {
            query.cut = cut_rows(call, multiprocessors, tensor::query_blocks(call.head_dim),
                                 tensor::kBlockRows, kStart);
            key_value.cut = cut_rows(call, multiprocessors, tensor::key_blocks(call.head_dim),
                                     tensor::kBlockRows, kKeysStart);
        } else {
            query.cut = cut_rows(call, multiprocessors, kSimpleBlocks, kSimpleRows, kStart);
            // Each tile of 16 keys is another block, and each split another partial sum.
            key_value.cut = cut_rows(call, multiprocessors, 1, kSimpleRows, kKeysStart);
        }
        const int64_t partial =
            call.batch * call.heads * key_value.cut.splits * call.keys * call.head_dim;
        const auto partials = [&](const View& gradient, const View& input) {
            const bool added_up = key_value.cut.splits > 1 || (input.shared && call.batch > 1);
            const bool direct = tensor && !added_up && tensor::writes(call, gradient);
            return gradient.data && !direct ? arena.floats(partial) : nullptr;
        };
        key_value.key = partials(call.grad_key, call.key);
        key_value.value = partials(call.grad_value, call.value);
        key_value.reference = partials(call.grad_reference_key, call.reference_key);
        bytes = arena.used();
    }

    bool with_keys() const {
        const BackwardCall& call = key_value.call;
        return call.grad_key.data || call.grad_value.data || call.grad_reference_key.data;
    }
};

View like(View result, const View& input) {
    result.shared = input.shared;
    return result;
}

const char* sentence(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* refusal(const Problem& p) {
    if (p.batch * p.heads > 2147483647) return "batch times heads must stay below 2**31";
    return nullptr;
}

}  // namespace

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int64_t forward_scratch(const ForwardCall& call, int multiprocessors) {
    return refusal(call) ? 0 : ForwardPlan(call, nullptr, multiprocessors).bytes;
}

int64_t backward_scratch(const BackwardCall& call, int multiprocessors) {
    return refusal(call) ? 0 : BackwardPlan(call, nullptr, multiprocessors).bytes;
}

const char* forward(const ForwardCall& call, void* scratch, int multiprocessors, void* stream) {
    if (const char* why = refusal(call)) return why;
    const ForwardPlan plan(call, scratch, multiprocessors);
    if (plan.bytes && !scratch) return "the forward pass needs its scratch memory";
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const ForwardArguments& a = plan.arguments;
    cudaError_t error = plan.tensor ? tensor::forward(a, on) : simple::forward(a, on);
    if (error == cudaSuccess && call.subject_loss) {
        SubjectLossArguments sums;
        sums.partials = a.partials;
        sums.subject_loss = call.subject_loss;
        sums.heads = call.heads;
        sums.batch = call.batch;
        sums.splits = a.cut.splits;
        error = sum_subject_loss(sums, on);
    }
    if (error == cudaSuccess && call.probs_count && !call.probs_all_heads) {
        MapArguments attn_probs;
        attn_probs.all = a.attn_probs;
        attn_probs.mean = call.attn_probs;
        attn_probs.heads = call.heads;
        attn_probs.entries = call.probs_count * call.queries;
        attn_probs.count = call.batch * attn_probs.entries;
        error = mean_maps(attn_probs, on);
    }
    return sentence(error);
}

const char* backward(const BackwardCall& call, void* scratch, int multiprocessors, void* stream) {
    if (const char* why = refusal(call)) return why;
    const BackwardPlan plan(call, scratch, multiprocessors);
    if (plan.bytes && !scratch) return "the backward pass needs its scratch memory";
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (!plan.with_keys() && !call.grad_query.data) return nullptr;
    const BackwardArguments& a = plan.key_value;
    cudaError_t error = cudaSuccess;
    if (plan.one_pass) {
        error = tensor::backward(a, on);
    } else {
        error = plan.tensor ? tensor::backward_query(plan.query, on)
                            : simple::backward_query(plan.query, on);
        if (error != cudaSuccess || !plan.with_keys()) return sentence(error);
        error = plan.tensor ? tensor::backward_key_value(a, on) : simple::backward_key_value(a, on);
    }
    if (error != cudaSuccess) return sentence(error);
    TotalArguments totals;
    totals.totals[0] = {a.key, like(call.grad_key, call.key)};
    totals.totals[1] = {a.value, like(call.grad_value, call.value)};
    totals.totals[2] = {a.reference, like(call.grad_reference_key, call.reference_key)};
    totals.batch = call.batch;
    totals.heads = call.heads;
    totals.splits = a.cut.splits;
    totals.keys = call.keys;
    totals.head_dim = call.head_dim;
    totals.dtype = call.dtype;
    return sentence(sum_totals(totals, on));
}

}  // namespace sefi::cuda
