// Choice of the instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sefi {

// Instruction sets of this build that the processor supports, best first.
std::vector<std::string> instruction_sets();

// The chosen instruction set: the best one, unless set_instruction_set was called.
std::string instruction_set();
const Kernels& kernels(DType dtype);

// Throws std::invalid_argument for a name that instruction_sets() lacks.
void set_instruction_set(const std::string& name);

}  // namespace sefi
