// The kernels of the matrix units: which calls they take, and how their rows are cut.
#pragma once

#include <type_traits>

#include "cuda/arguments.h"

namespace sefi::cuda::tensor {

// step(width) with one of the usual head widths as a type, whose `value` is a constant.
template <class Step>
auto for_width(int64_t head_dim, const Step& step) {
    switch (head_dim) {
        case 40:
            return step(std::integral_constant<int, 40>());
        case 64:
            return step(std::integral_constant<int, 64>());
        case 80:
            return step(std::integral_constant<int, 80>());
        default:
            return step(std::integral_constant<int, 160>());
    }
}

// The rows that a block's share is a multiple of, for all kernels.
constexpr int kBlockRows = 64;

// Blocks that are resident on a multiprocessor at a time, by their registers and shared memory.
int forward_blocks(int64_t head_dim);
constexpr int query_blocks(int64_t head_dim) { return head_dim > 80 ? 1 : 2; }
constexpr int key_blocks(int64_t head_dim) { return head_dim > 80 ? 1 : 2; }
int backward_blocks(int64_t head_dim);

// float16 and bfloat16, usual head widths, up to 80 keys, rows at multiples of 16 bytes.
bool takes(const ForwardCall& call);
bool takes(const BackwardCall& call);

// Whether their kernels can write a key-side gradient, two elements at a time.
bool writes(const BackwardCall& call, const View& gradient);

// Of the calls taken, those whose dQ, dK_t and dV_t one kernel computes: registers hold the sums of
// two gradients, and heads of 160 columns need the shared memory of 8.0 or 9.0. The others take a
// kernel of the queries, then of the keys.
bool in_one_pass(const BackwardCall& call);

cudaError_t forward(const ForwardArguments&, cudaStream_t);
cudaError_t backward(const BackwardArguments&, cudaStream_t);
cudaError_t backward_query(const BackwardArguments&, cudaStream_t);
cudaError_t backward_key_value(const BackwardArguments&, cudaStream_t);

}  // namespace sefi::cuda::tensor
