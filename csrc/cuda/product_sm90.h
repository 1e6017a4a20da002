// Products with an int4 weight on Hopper, which decode it on the way to the tensor cores. Plain C types.
#pragma once

#include "../weight.h"

namespace entrenar {

// out = in W^T + bias + low factor^T, or the gradient, out = in W + low factor; row-major bfloat16.
struct ProductSm90 {
  Weight weight;
  bool gradient;
  const void* in;      // [tokens, columns of W], in the gradient [tokens, rows of W]
  void* out;           // [tokens, rows of W], in the gradient [tokens, columns of W]
  int64_t tokens;
  const float* bias;   // [rows of W], or null; not in the gradient
  int rank;            // 0 leaves out the last term
  const void* low;     // [tokens, rank]
  const void* factor;  // [rows of W, rank], in the gradient [rank, columns of W]
};

// Whether product_sm90 can compute it, on the current device.
bool product_sm90_takes(const ProductSm90& product);

// Returns a cudaError_t.
int product_sm90(const ProductSm90& product, void* stream);

}  // namespace entrenar
