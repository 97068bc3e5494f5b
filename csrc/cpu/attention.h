// Forward and backward of whole tensors. The units of work do not depend on the number of threads,
// and sums over units have a fixed order, so results repeat bit for bit.
#pragma once

#include <cstddef>

#include "problem.h"

namespace sefi {

// Return the bytes of scratch memory used.
size_t forward(const ForwardCall& call, int threads);
size_t backward(const BackwardCall& call, int threads);

}  // namespace sefi
