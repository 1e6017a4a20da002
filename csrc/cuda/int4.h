// Launchers of the int4 kernels. Plain C types, so that nvcc needs nothing of torch; each returns a cudaError_t.
#pragma once

#include "../weight.h"

namespace entrenar {

int int4_quantize_cuda(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                       bool mse, uint8_t* codes, void* scales, void* stream);

// Codes begin at a multiple of 16 bytes. `stride` is the distance of rows in `out`, in elements; what lies between the
// columns and a multiple of 16 bytes may be overwritten.
int int4_dequantize_cuda(const Weight& weight, Dtype dtype, void* out, int64_t stride, void* stream);

}  // namespace entrenar
