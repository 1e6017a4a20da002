// Normalization of rows, and its gradients: what is checked and allocated. Each device computes them by the function
// that it passes.
#pragma once

#include <optional>
#include <tuple>

#include "arguments.h"
#include "pointwise.h"

namespace entrenar {

inline int64_t columns_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  return x.size(-1);
}

// The weight of rows of x, checked and contiguous; it may be absent.
inline std::optional<Tensor> packed_weight(const std::optional<Tensor>& weight, const Tensor& x) {
  if (!weight) return std::nullopt;
  STD_TORCH_CHECK(weight->scalar_type() == x.scalar_type() && weight->dim() == 1 && weight->size(0) == x.size(-1),
                  "weight must have ", x.size(-1), " elements of x's dtype");
  check_device(*weight, "weight", x);
  return packed(*weight);
}

// y = rms_norm(x), or of x + residual, which is written to `sum`; x and these are contiguous.
template <class Compute>
Tensor normalize(const Tensor& x, const Tensor* residual, const Tensor* sum, const std::optional<Tensor>& weight,
                 double eps, const Compute& compute) {
  RMSNorm n = {};
  n.dtype = float_dtype_of(x, "x");
  n.columns = columns_of(x);
  n.rows = n.columns ? x.numel() / n.columns : 0;
  n.eps = static_cast<float>(eps);
  const Tensor y = empty_as(x);
  n.x = x.const_data_ptr();
  const std::optional<Tensor> w = packed_weight(weight, x);
  if (w) n.weight = w->const_data_ptr();
  n.y = y.mutable_data_ptr();
  if (residual) {
    n.residual = residual->const_data_ptr();
    n.sum = sum->mutable_data_ptr();
  }
  compute(n);
  return y;
}

// compute(const RMSNorm&)
template <class Compute>
Tensor rms_norm_op(const Tensor& x, const std::optional<Tensor>& weight, double eps, const Compute& compute) {
  return normalize(packed(x), nullptr, nullptr, weight, eps, compute);
}

// compute(const RMSNorm&)
template <class Compute>
std::tuple<Tensor, Tensor> add_rms_norm_op(const Tensor& x, const Tensor& residual, const std::optional<Tensor>& weight,
                                           double eps, const Compute& compute) {
  check_like(residual, "residual", x);
  const Tensor input = packed(x), other = packed(residual);
  const Tensor sum = empty_as(input);
  const Tensor y = normalize(input, &other, &sum, weight, eps, compute);
  return {sum, y};
}

// dx, dw and db of a normalization, the last two empty where not wanted. compute(const NormBackward&)
template <class Compute>
std::tuple<Tensor, Tensor, Tensor> norm_backward_op(const Tensor& dy, const Tensor& x,
                                                    const std::optional<Tensor>& weight,
                                                    const std::optional<Tensor>& dsum, double eps, bool needs_dw,
                                                    bool needs_db, const Compute& compute) {
  NormBackward n = {};
  n.columns = columns_of(x);
  check_like(dy, "dy", x);
  if (dsum) check_like(*dsum, "dsum", x);
  const Tensor gradient = packed(dy), input = packed(x);
  const std::optional<Tensor> w = packed_weight(weight, x);
  const Tensor dx = empty_as(input);
  n.dtype = float_dtype_of(x, "x");
  n.rows = n.columns ? x.numel() / n.columns : 0;
  n.eps = static_cast<float>(eps);
  n.dy = gradient.const_data_ptr();
  n.x = input.const_data_ptr();
  if (w) n.weight = w->const_data_ptr();
  const Tensor beside = dsum ? packed(*dsum) : gradient;
  if (dsum) n.dsum = beside.const_data_ptr();
  n.dx = dx.mutable_data_ptr();
  const Tensor dw = torch::stable::new_empty(x, {needs_dw ? n.columns : 0});
  const Tensor db = torch::stable::new_empty(x, {needs_db ? n.columns : 0});
  if (needs_dw) n.dw = dw.mutable_data_ptr();
  if (needs_db) n.db = db.mutable_data_ptr();
  compute(n);
  return {dx, dw, db};
}

}  // namespace entrenar
