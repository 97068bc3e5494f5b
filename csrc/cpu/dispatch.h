// The choice of the instruction set, made once at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace sefi {

// Those that this build holds and this processor can run, best first.
std::vector<std::string> instruction_sets();

// The best one, unless set_instruction_set chose another.
const Kernels& kernels();

// Throws std::invalid_argument for a name that instruction_sets() lacks.
void set_instruction_set(const std::string& name);

}  // namespace sefi
