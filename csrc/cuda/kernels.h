// The kernels as the launcher sees them: one function each that starts it on a stream.
#pragma once

#include "cuda/arguments.h"

namespace sefi::cuda {

// Any size, layout and dtype.
namespace simple {
cudaError_t forward(const ForwardArguments&, cudaStream_t);
cudaError_t backward_query(const BackwardArguments&, cudaStream_t);
cudaError_t backward_key_value(const BackwardArguments&, cudaStream_t);
}  // namespace simple

cudaError_t sum_subject_loss(const SubjectLossArguments&, cudaStream_t);
cudaError_t mean_maps(const MapArguments&, cudaStream_t);
cudaError_t sum_totals(const TotalArguments&, cudaStream_t);

}  // namespace sefi::cuda
