// Normalization of rows, and its gradients, on CUDA.
#include "norm.h"

#include <torch/csrc/stable/library.h>

#include "../norm.h"
#include "device.h"

namespace entrenar {

namespace {

Tensor rms_norm(const Tensor& x, std::optional<Tensor> weight, double eps) {
  const OnDevice device(x);
  return rms_norm_op(x, weight, eps, [&](const RMSNorm& n) { device.check(rms_norm_cuda(n, device.stream())); });
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, std::optional<Tensor> weight,
                                        double eps) {
  const OnDevice device(x);
  return add_rms_norm_op(x, residual, weight, eps,
                         [&](const RMSNorm& n) { device.check(rms_norm_cuda(n, device.stream())); });
}

std::tuple<Tensor, Tensor, Tensor> backward(int (*launch)(const NormBackward&, float*, void*), const Tensor& dy,
                                            const Tensor& x, const std::optional<Tensor>& weight,
                                            const std::optional<Tensor>& dsum, double eps, bool needs_dw,
                                            bool needs_db) {
  const OnDevice device(x);
  return norm_backward_op(dy, x, weight, dsum, eps, needs_dw, needs_db, [&](const NormBackward& n) {
    const Tensor sums = torch::stable::new_empty(x, {norm_sums(n)}, ScalarType::Float);
    device.check(launch(n, sums.mutable_data_ptr<float>(), device.stream()));
  });
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> weight,
                                             std::optional<Tensor> dsum, double eps, bool needs_dw) {
  const auto [dx, dw, _] = backward(rms_norm_backward_cuda, dy, x, weight, dsum, eps, needs_dw, false);
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> weight,
                                                       double eps, bool needs_dw, bool needs_db) {
  return backward(layer_norm_backward_cuda, dy, x, weight, std::nullopt, eps, needs_dw, needs_db);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace entrenar
