// The Python module sefi_fast._C: raw pointers, sizes and strides in, no tensor library involved.
#include <string>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "python_call.h"

PYBIND11_MODULE(_C, module) {
    namespace py = pybind11;
    module.doc() = "Native core of sefi_fast: fused cross-attention on the CPU.";

    module.def(
        "forward", sefi::python::of_forward_call(&sefi::forward),
        "Writes output, subject loss and attn_probs; returns the bytes of scratch memory it used.");
    module.def("backward", sefi::python::of_backward_call(&sefi::backward),
               "Writes the gradients whose address is not 0; returns the bytes of scratch memory "
               "it used.");

    module.def("instruction_sets", &sefi::instruction_sets, "Those that run here, best first.");
    module.def("instruction_set", [] { return std::string(sefi::kernels().name); });
    module.def("set_instruction_set", &sefi::set_instruction_set, py::arg("name"));
    module.def("thread_source", &sefi::thread_source);
}
