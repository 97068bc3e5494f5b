// Forward and backward of whole tensors: the work is cut into units that do not depend on the
// number of threads, and sums over units are added in a fixed order, so results repeat bit for bit.
#pragma once

#include <cstddef>

#include "problem.h"

namespace sefi {

// Each returns the bytes of memory it used besides its inputs and results.
size_t forward(const ForwardCall& call, int threads);
size_t backward(const BackwardCall& call, int threads);

}  // namespace sefi
