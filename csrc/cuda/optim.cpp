// The optimizers' steps on CUDA, and the norm of gradients.
#include "optim.h"

#include <torch/csrc/stable/library.h>

#include "../optim_arguments.h"
#include "device.h"

namespace entrenar {

namespace {

// Uninitialized float32 memory on the device of `like`.
Tensor room(const Tensor& like, int64_t floats) { return torch::stable::new_empty(like, {floats}, ScalarType::Float); }

void step(const OptimWork& work, const OptimSettings& settings, const Tensor& param) {
  const OnDevice device(param);
  const int64_t count = work.tensors.size();
  Tensor steps = room(param, count * (sizeof(OptimStep) / sizeof(float)));
  device.check(optim_cuda(work.call, settings, work.tensors.data(), count,
                          static_cast<OptimStep*>(steps.mutable_data_ptr()), device.stream()));
}

Tensor grad_norm(Tensors grads, double max_norm) {
  const std::vector<NormTensor> tensors = norm_tensors(grads);
  const OnDevice device(grads[0]);
  int64_t pieces = 0;
  for (const NormTensor& tensor : tensors) pieces += (tensor.size + kNormPiece - 1) / kNormPiece;
  Tensor sums = room(grads[0], pieces), result = room(grads[0], 2);
  device.check(grad_norm_cuda(tensors.data(), tensors.size(), max_norm, static_cast<float*>(sums.mutable_data_ptr()),
                              static_cast<float*>(result.mutable_data_ptr()), device.stream()));
  return result;
}

using Ops = OptimOps<step>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("sgd_", TORCH_BOX(&Ops::sgd_));
  m.impl("adam_", TORCH_BOX(&Ops::adam_));
  m.impl("lion_", TORCH_BOX(&Ops::lion_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
}

}  // namespace entrenar
