// Cross-entropy and its gradient on CUDA. A target that is no class fails an assertion of the kernel.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include "../cross_entropy.h"
#include "device.h"

namespace entrenar {

namespace {

Tensor cross_entropy_losses(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  const OnDevice device(logits);
  return cross_entropy_losses_op(logits, target, ignore_index, [&](const CrossEntropy& p) {
    device.check(cross_entropy_cuda(p, device.stream()));
  });
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& target, const Tensor& scale, int64_t ignore_index) {
  const OnDevice device(logits);
  return cross_entropy_gradient_op(logits, target, scale, ignore_index, [&](const CrossEntropy& p) {
    device.check(cross_entropy_cuda(p, device.stream()));
  });
}

Tensor cross_entropy_gradient_(Tensor& logits, const Tensor& target, int64_t ignore_index) {
  const OnDevice device(logits);
  return cross_entropy_gradient_in_place_op(logits, target, ignore_index, [&](const CrossEntropy& p) {
    device.check(cross_entropy_cuda(p, device.stream()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("cross_entropy_losses", TORCH_BOX(&cross_entropy_losses));
  m.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
}

}  // namespace entrenar
