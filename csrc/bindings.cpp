// The Python module sefi_fast._C: raw pointers, sizes and strides in, no tensor library involved.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cpu/calls.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

// (address, batch size, batch stride, head stride, row stride); address 0: the tensor is absent.
using PyView = std::array<int64_t, 5>;
// (address, batch size, row length) of a dense [batch, row] tensor.
using PyRows = std::array<int64_t, 3>;

sefi::View view(const PyView& v) {
    const bool shared = v[1] == 1;
    return {reinterpret_cast<char*>(v[0]), shared ? 0 : v[2], v[3], v[4], shared};
}

template <class T>
T* pointer(int64_t address) {
    return reinterpret_cast<T*>(address);
}

int64_t batch_stride(const PyRows& rows) { return rows[1] == 1 ? 0 : rows[2]; }

void fill(sefi::Problem& p, const std::array<int64_t, 5>& sizes, int dtype, double scale,
          const std::array<PyView, 4>& inputs, const std::array<PyRows, 3>& rows, bool map_all_heads) {
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
    p.dtype = sefi::DType(dtype);
    p.scale = float(scale);
    p.query = view(inputs[0]);
    p.key = view(inputs[1]);
    p.value = view(inputs[2]);
    p.reference_key = view(inputs[3]);
    p.token_weights = pointer<const float>(rows[0][0]);
    p.token_weights_batch = batch_stride(rows[0]);
    p.key_mask = pointer<const uint8_t>(rows[1][0]);
    p.key_mask_batch = batch_stride(rows[1]);
    p.map_tokens = pointer<const int64_t>(rows[2][0]);
    p.map_tokens_batch = batch_stride(rows[2]);
    p.map_count = p.map_tokens ? rows[2][2] : 0;
    p.map_all_heads = map_all_heads;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native core of sefi_fast: fused cross-attention on the CPU.";

    module.def(
        "forward",
        [](const std::array<int64_t, 5>& sizes, int dtype, double scale,
           const std::array<PyView, 4>& inputs, const std::array<PyRows, 3>& rows, bool map_all_heads,
           const PyView& output, int64_t alignment, int64_t maps, int threads) {
            sefi::ForwardCall call;
            fill(call, sizes, dtype, scale, inputs, rows, map_all_heads);
            call.output = view(output);
            call.alignment = pointer<float>(alignment);
            call.maps = pointer<float>(maps);
            const py::gil_scoped_release release;
            return sefi::forward(call, threads);
        },
        "Writes output, alignment and maps; returns the bytes of scratch memory it used.");

    module.def(
        "backward",
        [](const std::array<int64_t, 5>& sizes, int dtype, double scale,
           const std::array<PyView, 4>& inputs, const std::array<PyRows, 3>& rows, bool map_all_heads,
           const PyView& grad_output, int64_t grad_alignment, int64_t grad_maps, bool reference_grad,
           const std::array<PyView, 4>& gradients, int threads) {
            sefi::BackwardCall call;
            fill(call, sizes, dtype, scale, inputs, rows, map_all_heads);
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
            const py::gil_scoped_release release;
            return sefi::backward(call, threads);
        },
        "Writes the gradients whose address is not 0; returns the bytes of scratch memory it used.");

    module.def("instruction_sets", &sefi::instruction_sets, "Those that run here, best first.");
    module.def("instruction_set", [] { return std::string(sefi::kernels().name); });
    module.def("set_instruction_set", &sefi::set_instruction_set, py::arg("name"));
    module.def("thread_source", &sefi::thread_source);
}
