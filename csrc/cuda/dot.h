// y = x Wᵀ + bias, or y += x Wᵀ + bias, for few rows of x, bound by reading W's codes.
#pragma once

#include "../weight.h"

namespace entrenar {

// Whether the kernel takes so many rows (64 of bfloat16, 21 of float32) and a weight at these addresses: codes must be
// aligned to 16 bytes, scales to their size.
bool int4_dot_takes(const Weight& w, Dtype dtype, int64_t rows);

// x [rows, w.columns] and y [rows, w.rows] are contiguous and of float32 or bfloat16; bias [w.rows] may be null. Returns
// a cudaError_t.
int int4_dot_cuda(const Weight& w, Dtype dtype, const void* x, int64_t rows, const float* bias, bool add_to_y, void* y,
                  void* stream);

// dx = dy W, or dx += dy W: up to 8 rows, of codes in blocks of 64 at the same addresses.
bool int4_dot_gradient_takes(const Weight& w, int64_t rows);

// dy [rows, w.rows] and dx [rows, w.columns] are contiguous and of float32 or bfloat16. Returns a cudaError_t.
int int4_dot_gradient_cuda(const Weight& w, Dtype dtype, const void* dy, int64_t rows, bool add_to_dx, void* dx,
                           void* stream);

}  // namespace entrenar
