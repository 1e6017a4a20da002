// Launchers of the activations' kernels. Plain C types; each returns a CUDA error.
#pragma once

#include "../pointwise.h"

namespace entrenar {

int binary_cuda(Binary f, Dtype dtype, int64_t size, const void* a, const void* b, void* out, void* stream);
// y, which may be dy, is written too if not null.
int swiglu_backward_cuda(Dtype dtype, int64_t size, const void* dy, const void* gate, const void* up, void* dgate,
                         void* dup, void* y, void* stream);
int softmax_backward_cuda(bool log, Dtype dtype, int64_t rows, int64_t columns, const void* dy, const void* y, void* dx,
                          void* stream);

}  // namespace entrenar
