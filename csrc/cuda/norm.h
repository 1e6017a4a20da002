// Launchers of the norms' kernels. Plain C types; each returns a CUDA error.
#pragma once

#include "../pointwise.h"

namespace entrenar {

int rms_norm_cuda(const RMSNorm& n, void* stream);

// The floats of memory that the gradients of these parameters need for their sums over rows.
int64_t norm_sums(const NormBackward& n);

int rms_norm_backward_cuda(const NormBackward& n, float* sums, void* stream);
int layer_norm_backward_cuda(const NormBackward& n, float* sums, void* stream);

}  // namespace entrenar
