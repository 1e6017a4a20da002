// rotary_embedding: y = x cos + R x sin with R (a, b) = (-b, a), and the transpose of that map, its gradient: what is
// checked and allocated. Each device computes it by the function that it passes.
#pragma once

#include <utility>

#include "arguments.h"
#include "pointwise.h"

namespace entrenar {

constexpr int64_t kRotaryMaxDims = 4;

inline Tensor with_packed_rows(const Tensor& x) { return x.dim() == 0 || x.stride(-1) == 1 ? x : packed(x); }

// The strides of `tensor` along the first three of x's dimensions counted as four, 0 where it is broadcast.
inline void strides_like(const Tensor& tensor, const Tensor& x, const char* name, int64_t* strides) {
  const int64_t missing = x.dim() - tensor.dim();
  STD_TORCH_CHECK(tensor.dim() > 0 && missing >= 0 && tensor.scalar_type() == x.scalar_type() &&
                      tensor.size(-1) == x.size(-1),
                  name, " must have x's dtype and last dimension, and no more dimensions than x");
  check_device(tensor, name, x);
  for (int64_t d = 0; d < kRotaryMaxDims - 1; d++) {
    const int64_t of_x = d - (kRotaryMaxDims - x.dim()), dim = of_x - missing;
    strides[d] = 0;
    if (dim >= 0 && tensor.size(dim) != 1) {
      STD_TORCH_CHECK(tensor.size(dim) == x.size(of_x), name, " must be broadcastable to x");
      strides[d] = tensor.stride(dim);
    }
  }
}

// compute(const Rotary&)
template <class Compute>
Tensor rotary_embedding_op(const Tensor& input, const Tensor& cosines, const Tensor& sines, bool transposed,
                           const Compute& compute) {
  const Tensor x = with_packed_rows(input), cos = with_packed_rows(cosines), sin = with_packed_rows(sines);
  STD_TORCH_CHECK(x.dim() > 0 && x.dim() <= kRotaryMaxDims && x.size(-1) % 2 == 0,
                  "x must have one to four dimensions, the last even");
  Rotary r = {};
  r.dtype = float_dtype_of(x, "x");
  r.transposed = transposed;
  r.half = x.size(-1) / 2;
  r.rows = r.half ? x.numel() / (2 * r.half) : 0;
  const Tensor like = torch::stable::empty_like(x);  // of elements that overlap it has other strides
  const Tensor y = with_packed_rows(like);
  strides_like(x, x, "x", r.strides[Rotary::kX]);
  strides_like(cos, x, "cos", r.strides[Rotary::kCos]);
  strides_like(sin, x, "sin", r.strides[Rotary::kSin]);
  strides_like(y, x, "y", r.strides[Rotary::kY]);
  for (int64_t d = 0; d < kRotaryMaxDims - 1; d++) {
    r.sizes[d] = d < kRotaryMaxDims - x.dim() ? 1 : x.size(d - (kRotaryMaxDims - x.dim()));
  }

  // The order of memory: the dimensions from the largest stride of x to the smallest.
  const auto swap_if_wrong = [&](int a, int b) {
    if (r.strides[Rotary::kX][a] >= r.strides[Rotary::kX][b]) return;
    std::swap(r.sizes[a], r.sizes[b]);
    for (auto& strides : r.strides) std::swap(strides[a], strides[b]);
  };
  swap_if_wrong(0, 1);
  swap_if_wrong(1, 2);
  swap_if_wrong(0, 1);

  r.x = x.const_data_ptr();
  r.cos = cos.const_data_ptr();
  r.sin = sin.const_data_ptr();
  r.y = y.mutable_data_ptr();
  compute(r);
  return y;
}

}  // namespace entrenar
