// Prints how the kernels of every head width are started for a call with the loss: lines of
// "kernel head_dim threads shared_bytes", the last two once more for the reference key's kernel.
#include <cstdio>

#include "cuda/kernels.h"
#include "cuda/tensor.h"

namespace {

template <class Call>
void fill(Call& call, int64_t head_dim, void* anything) {
    call.batch = call.heads = 1;
    call.queries = 4096;
    call.keys = 77;
    call.head_dim = head_dim;
    call.dtype = sefi::DType::bfloat16;
    call.reference_key.data = static_cast<char*>(anything);
}

}  // namespace

int main() {
    using namespace sefi::cuda;
    float anything = 0.0f;
    for (int head_dim : {40, 64, 80, 160}) {
        ForwardArguments forward;
        fill(forward.call, head_dim, &anything);
        std::printf("forward %d", head_dim);
        tensor::forward(forward, nullptr);
        BackwardArguments backward;
        fill(backward.call, head_dim, &anything);
        backward.with_reference = true;
        sefi::BackwardCall& call = backward.call;
        call.grad_output.data = call.grad_key.data = call.grad_value.data =
            reinterpret_cast<char*>(&anything);
        std::printf("\nbackward_query %d", head_dim);
        tensor::backward_query(backward, nullptr);
        std::printf("\nbackward %d", head_dim);
        tensor::backward(backward, nullptr);
        call.grad_reference_key = call.grad_key;
        std::printf("\nbackward_key_value %d", head_dim);
        tensor::backward_key_value(backward, nullptr);
        std::printf("\n");
    }
}
