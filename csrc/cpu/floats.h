// Arguments of the kernels that take float32, bfloat16 and float16 alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../arguments.h"

namespace entrenar {

constexpr int64_t kElementsToSplit = 1 << 15;  // fewer than these stay on one thread

inline Dtype float_dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  const auto sizes = tensor.sizes(), expected = x.sizes();
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() &&
                      std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()),
                  name, " must have the shape and dtype of the other tensors");
}

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// An uninitialized contiguous tensor of x's shape and dtype.
inline Tensor empty_as(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

}  // namespace entrenar
