// Cross-entropy and its gradient on the CPU.
#include "../cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dispatch.h"
#include "targets.h"

namespace entrenar {

namespace {

void compute(const CrossEntropy& p) {
  check_targets(p.targets, p.rows, p.classes, p.ignore_index);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.classes));
  torch::stable::parallel_for(0, p.rows, grain,
                              [&](int64_t begin, int64_t end) { kernels().cross_entropy(&p, begin, end); });
}

Tensor cross_entropy_losses(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  return cross_entropy_losses_op(logits, target, ignore_index, compute);
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& target, const Tensor& scale, int64_t ignore_index) {
  return cross_entropy_gradient_op(logits, target, scale, ignore_index, compute);
}

Tensor cross_entropy_gradient_(Tensor& logits, const Tensor& target, int64_t ignore_index) {
  return cross_entropy_gradient_in_place_op(logits, target, ignore_index, compute);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("cross_entropy_losses", TORCH_BOX(&cross_entropy_losses));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
}

}  // namespace entrenar
