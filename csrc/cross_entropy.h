// Cross-entropy of logits [rows, classes] with class targets, and its gradient, in place of the logits, if wanted: what
// is checked and allocated. Each device computes them by the function that it passes, and refuses what is no class.
#pragma once

#include "arguments.h"
#include "pointwise.h"

namespace entrenar {

inline const int64_t* targets_of(const Tensor& target, const Tensor& x) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous() && target.dim() == 1 &&
                      target.size(0) == x.size(0),
                  "target must be int64, contiguous, with ", x.size(0), " elements");
  check_device(target, "target", x);
  return target.const_data_ptr<int64_t>();
}

inline CrossEntropy cross_entropy_of(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  CrossEntropy p = {};
  p.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous matrix");
  p.targets = targets_of(target, logits);
  p.logits = logits.const_data_ptr();
  p.rows = logits.size(0);
  p.classes = logits.size(1);
  p.ignore_index = ignore_index;
  return p;
}

// compute(const CrossEntropy&)
template <class Compute>
Tensor cross_entropy_losses_op(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                               const Compute& compute) {
  const Tensor x = packed(logits), t = packed(target);
  CrossEntropy p = cross_entropy_of(x, t, ignore_index);
  Tensor losses = torch::stable::new_empty(logits, {p.rows}, ScalarType::Float);
  p.losses = losses.mutable_data_ptr<float>();
  compute(p);
  return losses;
}

// compute(const CrossEntropy&)
template <class Compute>
Tensor cross_entropy_gradient_op(const Tensor& logits, const Tensor& target, const Tensor& scale, int64_t ignore_index,
                                 const Compute& compute) {
  const Tensor x = packed(logits), t = packed(target), s = packed(scale);
  CrossEntropy p = cross_entropy_of(x, t, ignore_index);
  STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float && s.dim() == 1 && s.size(0) == p.rows,
                  "scale must be float32 with ", p.rows, " elements");
  check_device(s, "scale", x);
  Tensor gradient = torch::stable::new_empty(logits, {p.rows, p.classes});
  p.scales = s.const_data_ptr<float>();
  p.gradient = gradient.mutable_data_ptr();
  compute(p);
  return gradient;
}

// compute(const CrossEntropy&)
template <class Compute>
Tensor cross_entropy_gradient_in_place_op(Tensor& logits, const Tensor& target, int64_t ignore_index,
                                          const Compute& compute) {
  const Tensor t = packed(target);
  CrossEntropy p = cross_entropy_of(logits, t, ignore_index);
  Tensor losses = torch::stable::new_empty(logits, {p.rows}, ScalarType::Float);
  p.losses = losses.mutable_data_ptr<float>();
  p.gradient = logits.mutable_data_ptr();
  compute(p);
  return losses;
}

}  // namespace entrenar
