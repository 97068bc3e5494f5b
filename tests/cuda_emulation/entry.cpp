// Entry points for ctypes. They take the arguments of the Python binding as flat numbers.
#include <cstring>
#include <vector>

#include "cuda/api.h"
#include "machine.h"

namespace {

struct Numbers {
    const int64_t* next;

    int64_t take() { return *next++; }
    template <class T>
    T* pointer() {
        return reinterpret_cast<T*>(take());
    }
    sefi::View view() {
        sefi::View v;
        v.data = pointer<char>();
        v.shared = take() == 1;
        v.batch = take();
        if (v.shared) v.batch = 0;
        v.head = take();
        v.row = take();
        return v;
    }
    // (address, batch size, row length) of dense rows; also returns the batch stride.
    template <class T>
    const T* rows(int64_t& batch_stride, int64_t* length = nullptr) {
        const T* data = pointer<const T>();
        const int64_t batch = take(), row = take();
        batch_stride = batch == 1 ? 0 : row;
        if (length) *length = data ? row : 0;
        return data;
    }
    void fill(sefi::Problem& p, double scale) {
        p.batch = take();
        p.heads = take();
        p.queries = take();
        p.keys = take();
        p.head_dim = take();
        p.dtype = sefi::DType(take());
        p.scale = float(scale);
        p.query = view();
        p.key = view();
        p.value = view();
        p.reference_key = view();
        p.token_weights = rows<float>(p.token_weights_batch);
        p.key_mask = rows<uint8_t>(p.key_mask_batch);
        p.probs_positions = rows<int64_t>(p.probs_positions_batch, &p.probs_count);
        p.probs_all_heads = take() != 0;
    }
};

// Call run with scratch memory full of NaN, and check the guard zones around it.
template <class Run>
const char* with_scratch(int64_t bytes, const Run& run) {
    constexpr int64_t kZone = 4096;
    std::vector<char> memory(size_t(bytes + 2 * kZone + 256), char(0xff));
    char* block = memory.data() + kZone;
    block += -reinterpret_cast<uintptr_t>(block) % 256;
    if (const char* error = run(bytes ? block : nullptr)) return error;
    for (const char* at = memory.data(); at != memory.data() + memory.size(); ++at) {
        if ((at < block || at >= block + bytes) && *at != char(0xff)) {
            return "a kernel wrote outside its scratch memory";
        }
    }
    return nullptr;
}

}  // namespace

extern "C" {

void sefi_schedule(uint32_t seed, int late_copies) {
    emulation::set_schedule(seed, late_copies != 0);
}

void sefi_shared_limit(int64_t bytes) { emulation::set_shared_limit(size_t(bytes)); }

const char* sefi_forward(const int64_t* numbers, double scale, int num_sms) {
    Numbers from{numbers};
    sefi::ForwardCall call;
    from.fill(call, scale);
    call.output = from.view();
    call.subject_loss = from.pointer<float>();
    call.attn_probs = from.pointer<float>();
    return with_scratch(sefi::cuda::forward_scratch(call, num_sms), [&](void* scratch) {
        return sefi::cuda::forward(call, scratch, num_sms, nullptr);
    });
}

const char* sefi_backward(const int64_t* numbers, double scale, int num_sms) {
    Numbers from{numbers};
    sefi::BackwardCall call;
    from.fill(call, scale);
    call.grad_output = from.view();
    call.grad_subject_loss = from.pointer<const float>();
    call.grad_attn_probs = from.pointer<const float>();
    call.reference_grad = from.take() != 0;
    call.grad_query = from.view();
    call.grad_key = from.view();
    call.grad_value = from.view();
    call.grad_reference_key = from.view();
    return with_scratch(sefi::cuda::backward_scratch(call, num_sms), [&](void* scratch) {
        return sefi::cuda::backward(call, scratch, num_sms, nullptr);
    });
}
}
