// Launchers of the int4 kernels. Plain C types, so that nvcc needs nothing of torch; each returns cudaGetLastError().
#pragma once

#include "../weight.h"

namespace entrenar {

int int4_quantize_cuda(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                       uint8_t* codes, void* scales, void* stream);
int int4_dequantize_cuda(const Weight& weight, Dtype dtype, void* out, void* stream);

}  // namespace entrenar
