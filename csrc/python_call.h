// Conversion of integers and tuples from Python to the calls of problem.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "problem.h"

namespace sefi::python {

// (address, batch size, batch stride, head stride, row stride); the address is 0 if absent.
using PyView = std::array<int64_t, 5>;
// (address, batch size, row length) of a dense [batch, row] tensor.
using PyRows = std::array<int64_t, 3>;
// batch, heads, queries, keys, head_dim.
using PySizes = std::array<int64_t, 5>;
// query, key, value, reference_key, or their gradients.
using PyViews = std::array<PyView, 4>;
// token_weights, key_mask, probs_positions.
using PyExtras = std::array<PyRows, 3>;

// More elements than fit in any memory; a product of two such numbers fits in 64 bits.
constexpr int64_t kMaxElements = int64_t(1) << 48;

inline void refuse(bool wrong, const char* name, const char* why) {
    if (wrong) throw std::invalid_argument(std::string(name) + why);
}

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

inline void check_product(const char* name, std::initializer_list<int64_t> sizes) {
    int64_t product = 1;
    for (int64_t size : sizes) {
        refuse(size > kMaxElements / product, name, " has too many elements");
        product *= size;
    }
}

// A tensor with the batch and heads of the problem and `rows` rows, or an absent one.
inline View view(const Problem& p, const PyView& v, int64_t rows, const char* name) {
    if (v[0] == 0) return {};
    refuse(v[1] != 1 && v[1] != p.batch, name, " has a batch that is neither 1 nor the query's");
    const int64_t sizes[] = {v[1], p.heads, rows};
    for (int i = 0; i < 3; ++i) {
        const bool fits = v[i + 2] >= 0 && v[i + 2] <= kMaxElements / sizes[i];
        refuse(sizes[i] > 1 && !fits, name, " has a stride that is negative or too large");
    }
    const bool shared = v[1] == 1;
    return {pointer<char>(v[0]), shared ? 0 : v[2], v[3], v[4], shared};
}

inline View present(const Problem& p, const PyView& v, int64_t rows, const char* name) {
    refuse(v[0] == 0, name, " has no address");
    return view(p, v, rows, name);
}

// A result. Its batch is that of the query or, if shared, 1.
inline View result(const Problem& p, const PyView& v, int64_t rows, bool shared, const char* name) {
    refuse(v[0] != 0 && v[1] != (shared ? 1 : p.batch), name, " has a batch that does not fit");
    return view(p, v, rows, name);
}

// The batch stride of a dense tensor with `length` columns.
inline int64_t batch_stride(const Problem& p, const PyRows& rows, int64_t length,
                            const char* name) {
    if (rows[0] == 0) return 0;
    refuse(rows[1] != 1 && rows[1] != p.batch, name,
           " has a batch that is neither 1 nor the query's");
    refuse(rows[2] != length, name, " has a length that does not fit");
    return rows[1] == 1 ? 0 : length;
}

inline void fill(Problem& p, const PySizes& sizes, int dtype, double scale, const PyViews& inputs,
                 const PyExtras& extras, bool probs_all_heads) {
    if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype code must be 0, 1 or 2");
    for (int64_t size : sizes) {
        if (size < 1) throw std::invalid_argument("all sizes must be positive");
    }
    if (sizes[3] > kMaxKeys || sizes[4] > kMaxHeadDim) {
        const std::string limit = std::to_string(kMaxKeys);
        throw std::invalid_argument("keys and head_dim end at " + limit);
    }
    check_product("query", {sizes[0], sizes[1], sizes[2], sizes[4]});
    check_product("key", {sizes[0], sizes[1], sizes[3], sizes[4]});
    p.batch = sizes[0];
    p.heads = sizes[1];
    p.queries = sizes[2];
    p.keys = sizes[3];
    p.head_dim = sizes[4];
    p.dtype = DType(dtype);
    p.scale = float(scale);
    p.query = present(p, inputs[0], p.queries, "query");
    refuse(inputs[0][1] != p.batch, "query", " has a batch that does not fit");
    p.key = present(p, inputs[1], p.keys, "key");
    p.value = present(p, inputs[2], p.keys, "value");
    p.reference_key = view(p, inputs[3], p.keys, "reference_key");
    p.token_weights = pointer<const float>(extras[0][0]);
    p.token_weights_batch = batch_stride(p, extras[0], p.keys, "token_weights");
    p.key_mask = pointer<const uint8_t>(extras[1][0]);
    p.key_mask_batch = batch_stride(p, extras[1], p.keys, "key_mask");
    p.probs_positions = pointer<const int64_t>(extras[2][0]);
    p.probs_count = p.probs_positions ? extras[2][2] : 0;
    refuse(p.probs_count < 0, "probs_positions", " has a negative length");
    p.probs_positions_batch = batch_stride(p, extras[2], p.probs_count, "probs_positions");
    check_product("attn_probs", {p.batch, p.heads, p.queries, std::max<int64_t>(p.probs_count, 1)});
    p.probs_all_heads = probs_all_heads;
}

// A Python function with the arguments of a forward call and the further arguments of `run`.
template <class Result, class... Rest>
auto bind_forward(Result (*run)(const ForwardCall&, Rest...)) {
    return [run](const PySizes& sizes, int dtype, double scale, const PyViews& inputs,
                 const PyExtras& extras, bool probs_all_heads, const PyView& output,
                 int64_t subject_loss, int64_t attn_probs, Rest... rest) {
        ForwardCall call;
        fill(call, sizes, dtype, scale, inputs, extras, probs_all_heads);
        refuse(output[0] == 0, "output", " has no address");
        call.output = result(call, output, call.queries, false, "output");
        refuse(subject_loss == 0, "subject_loss", " has no address");
        call.subject_loss = pointer<float>(subject_loss);
        refuse(call.probs_count && attn_probs == 0, "attn_probs", " has no address");
        call.attn_probs = pointer<float>(attn_probs);
        const pybind11::gil_scoped_release release;
        return run(call, rest...);
    };
}

// A Python function with the arguments of a backward call and the further arguments of `run`.
template <class Result, class... Rest>
auto bind_backward(Result (*run)(const BackwardCall&, Rest...)) {
    return [run](const PySizes& sizes, int dtype, double scale, const PyViews& inputs,
                 const PyExtras& extras, bool probs_all_heads, const PyView& grad_output,
                 int64_t grad_subject_loss, int64_t grad_attn_probs, bool reference_grad,
                 const PyViews& gradients, Rest... rest) {
        BackwardCall call;
        fill(call, sizes, dtype, scale, inputs, extras, probs_all_heads);
        call.grad_output = result(call, grad_output, call.queries, false, "grad_output");
        call.grad_subject_loss = pointer<const float>(grad_subject_loss);
        call.grad_attn_probs = pointer<const float>(grad_attn_probs);
        call.reference_grad = reference_grad;
        call.grad_query = result(call, gradients[0], call.queries, false, "grad_query");
        call.grad_key = result(call, gradients[1], call.keys, call.key.shared, "grad_key");
        call.grad_value = result(call, gradients[2], call.keys, call.value.shared, "grad_value");
        call.grad_reference_key =
            result(call, gradients[3], call.keys, call.reference_key.shared, "grad_reference_key");
        if (call.grad_value.data && !call.grad_output.data) {
            throw std::invalid_argument("no gradient reaches the value");
        }
        if (call.grad_reference_key.data && !(reference_grad && call.with_reference())) {
            throw std::invalid_argument("no gradient reaches the reference key");
        }
        const pybind11::gil_scoped_release release;
        return run(call, rest...);
    };
}

}  // namespace sefi::python
