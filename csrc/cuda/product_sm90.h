// Products with int4 weights on Hopper, which decode them on the way to the tensor cores. Plain C types.
#pragma once

#include "../weight.h"

namespace entrenar {

// out_i = in W_i^T + bias_i + low_i factor_i^T for several weights that share their columns, or the gradient,
// out = sum of in_i W_i + low_i factor_i; row-major bfloat16.
struct ProductSm90 {
  static constexpr int kMost = 3;
  struct Source {
    Weight weight;
    const void* in;      // [tokens, columns of W], the same for all; in the gradient [tokens, rows of W]
    void* out;           // [tokens, rows of W]; in the gradient [tokens, columns of W], the first's
    const float* bias;   // [rows of W], or null; not in the gradient
    const void* low;     // [tokens, rank]; in the gradient all side by side, the first's
    const void* factor;  // [rows of W, rank]; in the gradient [rank, columns of W]
  };
  Source sources[kMost];
  int count;
  bool gradient;
  int64_t tokens;
  int rank;  // of each factor; 0 leaves out the last term
};

// Whether product_sm90 can compute it, on the current device.
bool product_sm90_takes(const ProductSm90& product);

// Returns a cudaError_t.
int product_sm90(const ProductSm90& product, void* stream);

}  // namespace entrenar
