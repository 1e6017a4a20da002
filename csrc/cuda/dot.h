// y = x Wᵀ + bias for few rows of x, bound by reading W's codes.
#pragma once

#include "../weight.h"

namespace entrenar {

// The bfloat16 numbers whose sum is an element of x.
constexpr int bfloat16_parts(Dtype dtype) { return dtype == kFloat32 ? 3 : 1; }

// Up to how many rows the kernel takes.
constexpr int64_t most_dot_rows(Dtype dtype) { return 64 / bfloat16_parts(dtype); }

// x [rows, w.columns] and y [rows, w.rows] are contiguous and of float32 or bfloat16; bias [w.rows] may be null. Codes
// must be aligned to 16 bytes. Returns cudaGetLastError().
int int4_dot_cuda(const Weight& w, Dtype dtype, const void* x, int64_t rows, const float* bias, void* y, void* stream);

}  // namespace entrenar
