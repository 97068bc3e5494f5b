// The Python module sefi_fast._C. It takes raw pointers, sizes and strides, without a tensor
// library.
#include <string>

#include "cpu/attention.h"
#include "cpu/dispatch.h"
#include "cpu/threads.h"
#include "python_call.h"

PYBIND11_MODULE(_C, module) {
    namespace py = pybind11;
    module.doc() = "Native core of sefi_fast: fused cross-attention on the CPU.";

    module.def(
        "forward", sefi::python::bind_forward(&sefi::forward),
        "Write output, subject loss and attn_probs and return the bytes of scratch memory used.");
    module.def(
        "backward", sefi::python::bind_backward(&sefi::backward),
        "Write the gradients whose address is not 0 and return the bytes of scratch memory used.");

    module.def("instruction_sets", &sefi::instruction_sets,
               "Instruction sets that this processor supports, best first.");
    module.def("instruction_set", &sefi::instruction_set);
    module.def("set_instruction_set", &sefi::set_instruction_set, py::arg("name"));
    module.def("thread_source", &sefi::thread_source);
}
