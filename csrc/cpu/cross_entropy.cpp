// Cross-entropy of logits [rows, classes] with class targets, and its gradient; in place of the logits, if wanted.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../arguments.h"
#include "dispatch.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

CrossEntropy checked(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  CrossEntropy p = {};
  p.dtype = dtype_of(logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be a contiguous matrix");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.is_contiguous() && target.dim() == 1 &&
                      target.size(0) == logits.size(0),
                  "target must be int64, contiguous, with ", logits.size(0), " elements");
  p.logits = logits.const_data_ptr();
  p.rows = logits.size(0);
  p.classes = logits.size(1);
  p.targets = target.const_data_ptr<int64_t>();
  p.ignore_index = ignore_index;
  for (int64_t row = 0; row < p.rows; row++) {
    const int64_t value = p.targets[row];
    STD_TORCH_CHECK(value == ignore_index || (value >= 0 && value < p.classes), "Target ", value,
                    " is out of bounds: row ", row, " has ", p.classes, " classes");
  }
  return p;
}

void run(const CrossEntropy& p) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.classes));
  parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { kernels().cross_entropy(&p, begin, end); });
}

Tensor cross_entropy_losses(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  const Tensor x = torch::stable::contiguous(logits), t = torch::stable::contiguous(target);
  CrossEntropy p = checked(x, t, ignore_index);
  Tensor losses = torch::stable::new_empty(logits, {p.rows}, ScalarType::Float);
  p.losses = losses.mutable_data_ptr<float>();
  run(p);
  return losses;
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& target, const Tensor& scale, int64_t ignore_index) {
  const Tensor x = torch::stable::contiguous(logits), t = torch::stable::contiguous(target);
  const Tensor s = torch::stable::contiguous(scale);
  CrossEntropy p = checked(x, t, ignore_index);
  STD_TORCH_CHECK(s.scalar_type() == ScalarType::Float && s.dim() == 1 && s.size(0) == p.rows,
                  "scale must be float32 with ", p.rows, " elements");
  Tensor gradient = torch::stable::new_empty(logits, {p.rows, p.classes});
  p.scales = s.const_data_ptr<float>();
  p.gradient = gradient.mutable_data_ptr();
  run(p);
  return gradient;
}

Tensor cross_entropy_gradient_(Tensor& logits, const Tensor& target, int64_t ignore_index) {
  const Tensor t = torch::stable::contiguous(target);
  CrossEntropy p = checked(logits, t, ignore_index);
  Tensor losses = torch::stable::new_empty(logits, {p.rows}, ScalarType::Float);
  p.losses = losses.mutable_data_ptr<float>();
  p.gradient = logits.mutable_data_ptr();
  run(p);
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("cross_entropy_losses", TORCH_BOX(&cross_entropy_losses));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
}

}  // namespace entrenar
