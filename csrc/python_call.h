// What Python hands over as integers and tuples, made into the calls of problem.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "problem.h"

namespace sefi::python {

// (address, batch size, batch stride, head stride, row stride); address 0: the tensor is absent.
using PyView = std::array<int64_t, 5>;
// (address, batch size, row length) of a dense [batch, row] tensor.
using PyRows = std::array<int64_t, 3>;
// batch, heads, queries, keys, head_dim.
using PySizes = std::array<int64_t, 5>;
// query, key, value, reference_key, or their gradients.
using PyViews = std::array<PyView, 4>;
// token_weights, key_mask, map_tokens.
using PyExtras = std::array<PyRows, 3>;

inline View view(const PyView& v) {
    const bool shared = v[1] == 1;
    return {reinterpret_cast<char*>(v[0]), shared ? 0 : v[2], v[3], v[4], shared};
}

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

inline int64_t batch_stride(const PyRows& rows) { return rows[1] == 1 ? 0 : rows[2]; }

inline void fill(Problem& p, const PySizes& sizes, int dtype, double scale, const PyViews& inputs,
                 const PyExtras& extras, bool map_all_heads) {
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2");
    for (int64_t size : sizes) {
        if (size < 1) throw std::invalid_argument("all sizes must be positive");
    }
    if (sizes[3] > 256 || sizes[4] > 256) throw std::invalid_argument("keys and head_dim end at 256");
    p.batch = sizes[0];
    p.heads = sizes[1];
    p.queries = sizes[2];
    p.keys = sizes[3];
    p.head_dim = sizes[4];
    p.dtype = DType(dtype);
    p.scale = float(scale);
    p.query = view(inputs[0]);
    p.key = view(inputs[1]);
    p.value = view(inputs[2]);
    p.reference_key = view(inputs[3]);
    p.token_weights = pointer<const float>(extras[0][0]);
    p.token_weights_batch = batch_stride(extras[0]);
    p.key_mask = pointer<const uint8_t>(extras[1][0]);
    p.key_mask_batch = batch_stride(extras[1]);
    p.map_tokens = pointer<const int64_t>(extras[2][0]);
    p.map_tokens_batch = batch_stride(extras[2]);
    p.map_count = p.map_tokens ? extras[2][2] : 0;
    p.map_all_heads = map_all_heads;
}

// A Python function: the arguments of a forward call, then `Rest`, which is what `run` adds to it.
template <class Result, class... Rest>
auto of_forward_call(Result (*run)(const ForwardCall&, Rest...)) {
    return [run](const PySizes& sizes, int dtype, double scale, const PyViews& inputs,
                 const PyExtras& extras, bool map_all_heads, const PyView& output,
                 int64_t alignment, int64_t maps, Rest... rest) {
        ForwardCall call;
        fill(call, sizes, dtype, scale, inputs, extras, map_all_heads);
        call.output = view(output);
        call.alignment = pointer<float>(alignment);
        call.maps = pointer<float>(maps);
        const pybind11::gil_scoped_release release;
        return run(call, rest...);
    };
}

// The same for a backward call.
template <class Result, class... Rest>
auto of_backward_call(Result (*run)(const BackwardCall&, Rest...)) {
    return [run](const PySizes& sizes, int dtype, double scale, const PyViews& inputs,
                 const PyExtras& extras, bool map_all_heads, const PyView& grad_output,
                 int64_t grad_alignment, int64_t grad_maps, bool reference_grad,
                 const PyViews& gradients, Rest... rest) {
        BackwardCall call;
        fill(call, sizes, dtype, scale, inputs, extras, map_all_heads);
        call.grad_output = view(grad_output);
        call.grad_alignment = pointer<const float>(grad_alignment);
        call.grad_maps = pointer<const float>(grad_maps);
        call.reference_grad = reference_grad;
        call.grad_query = view(gradients[0]);
        call.grad_key = view(gradients[1]);
        call.grad_value = view(gradients[2]);
        call.grad_reference_key = view(gradients[3]);
        if (call.grad_reference_key.data && !(reference_grad && call.with_reference())) {
            throw std::invalid_argument("no gradient reaches the reference key");
        }
        const pybind11::gil_scoped_release release;
        return run(call, rest...);
    };
}

}  // namespace sefi::python
