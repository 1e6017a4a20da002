// The launchers of the optimizers' steps, and of the norm of gradients.
#pragma once

#include "../grad_norm.h"
#include "../optim_step.h"

namespace entrenar {

// `steps` is room for the numbers of every tensor.
int optim_cuda(const OptimCall& call, const OptimSettings& settings, const OptimTensor* tensors, int64_t count,
               OptimStep* steps, void* stream);

// `sums` is room for one of each piece of kNormPiece elements; out[0] is the norm, out[1] the factor that clips it.
int grad_norm_cuda(const NormTensor* tensors, int64_t count, double max_norm, float* sums, float* out, void* stream);

}  // namespace entrenar
