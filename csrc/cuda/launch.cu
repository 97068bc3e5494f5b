// Entry points: choose the kernels and their splits, lay out the scratch memory, launch.
#include <algorithm>
#include <cmath>

#include "cuda/api.h"
#include "cuda/kernels.h"

namespace sefi::cuda {
namespace mma {
namespace {

// Whether every row of a head starts at a multiple of 16 bytes, with a row stride of 32 bits.
bool aligned(const Problem& p, const View& view, int64_t batch, int64_t rows) {
    const auto even = [](int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; };
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
           even(view.shared ? 1 : batch, view.batch) && even(p.heads, view.head) &&
           even(rows, view.row) && view.row < (int64_t(1) << 31);
}

bool supports(const Problem& p) {
    const int64_t d = p.head_dim;
    return p.dtype != DType::float32 && (d == 40 || d == 64 || d == 80 || d == 160) &&
           p.keys <= kKeys && p.queries <= (int64_t(1) << 30) && p.scale >= 0.0f &&
           aligned(p, p.query, p.batch, p.queries) && aligned(p, p.key, p.batch, p.keys) &&
           aligned(p, p.value, p.batch, p.keys) && aligned(p, p.reference_key, p.batch, p.keys);
}

bool supports(const ForwardCall& call) {
    const Problem& p = call;
    return supports(p) && aligned(p, call.output, p.batch, p.queries);
}

bool supports(const BackwardCall& call) {
    const Problem& p = call;
    return supports(p) && aligned(p, call.grad_output, p.batch, p.queries) &&
           aligned(p, call.grad_query, p.batch, p.queries);
}

}  // namespace
}  // namespace mma

namespace {

constexpr int kSimtCtasPerSm = 4;
constexpr int64_t kSimtRows = 16;

// Hands out 256-byte aligned pieces of one block; without a block it only counts the bytes.
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

// Time of a block in addition to its rows, in units of rows: it loads the keys, and a block of the
// dK/dV kernels also writes partial sums, which another kernel adds.
constexpr double kCtaOverheadUnits = 0.5, kDkdvCtaOverheadUnits = 2.0;

// Split the rows, in multiples of `unit` rows, to minimize waves * time of a block. One block more
// than fit on the device at once costs a whole wave. choose_num_splits in kernels/plan.py is the
// same algorithm with other constants.
SplitPlan choose_num_splits(const Problem& p, int num_sms, int ctas_per_sm, int64_t unit,
                            double overhead_units) {
    const int64_t units = (p.queries + unit - 1) / unit;
    const int64_t ctas_per_wave = int64_t(ctas_per_sm) * std::max(num_sms, 1);
    double least = 0;
    SplitPlan split;
    // Down from all rows in one block; of the sizes that give the same number of splits only the
    // smallest counts.
    for (int64_t units_per_cta = units; units_per_cta >= 1; --units_per_cta) {
        const int64_t num_splits = (units + units_per_cta - 1) / units_per_cta;
        if (num_splits > 65535) break;
        units_per_cta = (units + num_splits - 1) / num_splits;
        const int64_t waves = (p.batch * p.heads * num_splits + ctas_per_wave - 1) / ctas_per_wave;
        const double cost = double(waves) * (double(units_per_cta) + overhead_units);
        if (num_splits == 1 || cost < least) {
            least = cost;
            split = {units_per_cta * unit, num_splits};
        }
    }
    return split;
}

template <class Params>
void set_scale(Params& params, float scale) {
    constexpr float kLog2e = 1.44269504088896341f, kSmallest = 1e-30f;
    // Not 0: hidden scores are -inf, and their product would be NaN.
    params.sm_scale_log2 = std::max(std::fabs(scale) * kLog2e, kSmallest);
    params.scale_sign = scale < 0 ? -1.0f : 1.0f;
}

struct FwdPlan {
    bool use_mma;
    FwdParams params;
    int64_t bytes;

    FwdPlan(const ForwardCall& call, void* scratch, int num_sms) : use_mma(mma::supports(call)) {
        Arena arena(scratch);
        params.call = call;
        params.split =
            use_mma
                ? choose_num_splits(call, num_sms, mma::fwd_ctas_per_sm(call.head_dim),
                                    mma::kBlockRows, kCtaOverheadUnits)
                : choose_num_splits(call, num_sms, kSimtCtasPerSm, kSimtRows, kCtaOverheadUnits);
        set_scale(params, call.scale);
        const int64_t heads = call.batch * call.heads;
        if (call.reference_key.data) {
            params.partials = arena.floats(heads * params.split.num_splits);
        }
        if (call.probs_count) {
            params.attn_probs = call.probs_all_heads
                                    ? call.attn_probs
                                    : arena.floats(heads * call.probs_count * call.queries);
        }
        bytes = arena.used();
    }
};

struct BwdPlan {
    bool use_mma, fused;
    BwdParams dq, dkdv;
    int64_t bytes;

    BwdPlan(const BackwardCall& call, void* scratch, int num_sms)
        : use_mma(mma::supports(call)), fused(use_mma && mma::fuses_dq(call)) {
        Arena arena(scratch);
        dq.call = call;
        dq.with_reference = call.with_reference();
        dq.reference_grad = call.reference_grad && call.with_reference();
        dq.probs_grad_share = call.probs_all_heads ? 1.0f : 1.0f / float(call.heads);
        set_scale(dq, call.scale);
        // A multiple of a tile, so that reading a tile's statistics needs no bounds check.
        dq.padded_rows = (call.queries + mma::kBlockRows - 1) / mma::kBlockRows * mma::kBlockRows;
        if (!fused) {
            dq.row_stats = arena.floats(call.batch * call.heads * kRowStats * dq.padded_rows);
        }
        dkdv = dq;
        const auto split = [&](int ctas_per_sm, int64_t unit, double overhead_units) {
            return choose_num_splits(call, num_sms, ctas_per_sm, unit, overhead_units);
        };
        const int64_t d = call.head_dim;
        if (fused) {
            dkdv.split = split(mma::bwd_ctas_per_sm(d), mma::kBlockRows, kDkdvCtaOverheadUnits);
        } else if (use_mma) {
            dq.split = split(mma::bwd_dq_ctas_per_sm(d), mma::kBlockRows, kCtaOverheadUnits);
            dkdv.split =
                split(mma::bwd_dkdv_ctas_per_sm(d), mma::kBlockRows, kDkdvCtaOverheadUnits);
        } else {
            dq.split = split(kSimtCtasPerSm, kSimtRows, kCtaOverheadUnits);
            // Few splits, because each tile of 16 keys is a block already.
            dkdv.split = split(1, kSimtRows, kDkdvCtaOverheadUnits);
        }
        const int64_t entries =
            call.batch * call.heads * dkdv.split.num_splits * call.keys * call.head_dim;
        const auto partials = [&](const View& gradient, const View& input) {
            const bool summed = dkdv.split.num_splits > 1 || (input.shared && call.batch > 1);
            const bool direct =
                use_mma && !summed && mma::aligned(call, gradient, call.batch, call.keys);
            return gradient.data && !direct ? arena.floats(entries) : nullptr;
        };
        dkdv.key = partials(call.grad_key, call.key);
        dkdv.value = partials(call.grad_value, call.value);
        dkdv.reference = partials(call.grad_reference_key, call.reference_key);
        bytes = arena.used();
    }

    bool with_dkdv() const {
        const BackwardCall& call = dkdv.call;
        return call.grad_key.data || call.grad_value.data || call.grad_reference_key.data;
    }
};

SplitGradient split_gradient(const float* partials, View result, const View& input) {
    result.shared = input.shared;
    return {partials, result};
}

const char* message(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* not_supported_reason(const Problem& p) {
    if (p.batch * p.heads > 2147483647) return "batch times heads must stay below 2**31";
    return nullptr;
}

}  // namespace

int driver_version() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int64_t forward_scratch(const ForwardCall& call, int num_sms) {
    return not_supported_reason(call) ? 0 : FwdPlan(call, nullptr, num_sms).bytes;
}

int64_t backward_scratch(const BackwardCall& call, int num_sms) {
    return not_supported_reason(call) ? 0 : BwdPlan(call, nullptr, num_sms).bytes;
}

const char* forward(const ForwardCall& call, void* scratch, int num_sms, void* stream) {
    if (const char* reason = not_supported_reason(call)) return reason;
    const FwdPlan plan(call, scratch, num_sms);
    if (plan.bytes && !scratch) return "the forward pass needs its scratch memory";
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    const FwdParams& params = plan.params;
    cudaError_t error = plan.use_mma ? mma::attn_fwd(params, on) : simt::attn_fwd(params, on);
    if (error == cudaSuccess && call.subject_loss) {
        error = reduce_loss(
            {params.partials, call.subject_loss, call.batch, call.heads, params.split.num_splits},
            on);
    }
    if (error == cudaSuccess && call.probs_count && !call.probs_all_heads) {
        const int64_t entries = call.probs_count * call.queries;
        error = average_heads(
            {params.attn_probs, call.attn_probs, call.heads, entries, call.batch * entries}, on);
    }
    return message(error);
}

const char* backward(const BackwardCall& call, void* scratch, int num_sms, void* stream) {
    if (const char* reason = not_supported_reason(call)) return reason;
    const BwdPlan plan(call, scratch, num_sms);
    if (plan.bytes && !scratch) return "the backward pass needs its scratch memory";
    const cudaStream_t on = static_cast<cudaStream_t>(stream);
    if (!plan.with_dkdv() && !call.grad_query.data) return nullptr;
    const BwdParams& params = plan.dkdv;
    cudaError_t error = cudaSuccess;
    if (plan.fused) {
        error = mma::attn_bwd(params, on);
    } else {
        error = plan.use_mma ? mma::attn_bwd_dq(plan.dq, on) : simt::attn_bwd_dq(plan.dq, on);
        if (error != cudaSuccess || !plan.with_dkdv()) return message(error);
        error = plan.use_mma ? mma::attn_bwd_dkdv(params, on) : simt::attn_bwd_dkdv(params, on);
    }
    if (error != cudaSuccess) return message(error);
    const ReduceSplitsParams sums{
        {split_gradient(params.key, call.grad_key, call.key),
         split_gradient(params.value, call.grad_value, call.value),
         split_gradient(params.reference, call.grad_reference_key, call.reference_key)},
        call.batch,
        call.heads,
        params.split.num_splits,
        call.keys,
        call.head_dim,
        1,
        call.dtype};
    return message(reduce_splits(sums, on));
}

}  // namespace sefi::cuda
