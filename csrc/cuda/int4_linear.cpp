// int4_linear on CUDA: y = x Wᵀ + b, and its gradient dx = dy W.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "device.h"
#include "product.h"

namespace entrenar {

namespace {

Weight weight_of(const Tensor& x, const Tensor& codes, const Tensor& scales, int64_t columns, int64_t block) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  check_device(codes, "codes", x);
  check_device(scales, "scales", x);
  return int4_weight(codes, scales, columns, block);
}

Tensor int4_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, std::optional<Tensor> bias,
                   int64_t block, bool int8) {
  refuse_int8(int8);
  const Weight w = weight_of(x, codes, scales, x.size(-1), block);
  dtype_of(x, "x");
  check_bias(bias, w.rows);
  if (bias) check_device(*bias, "bias", x);
  const OnDevice device(x);
  Tensor y = empty_with_last(x, w.rows), flat = matrix(y);
  multiply(matrix(packed(x)), w, true, bias, flat);
  return y;
}

Tensor int4_linear_dx(const Tensor& dy, const Tensor& codes, const Tensor& scales, int64_t in_features,
                      int64_t block) {
  const Weight w = weight_of(dy, codes, scales, in_features, block);
  dtype_of(dy, "dy");
  STD_TORCH_CHECK(dy.size(-1) == w.rows, "dy must have ", w.rows, " columns, not ", dy.size(-1));
  const OnDevice device(dy);
  Tensor dx = empty_with_last(dy, in_features), flat = matrix(dx);
  multiply(matrix(packed(dy)), w, false, std::nullopt, flat);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int4_linear_dx", TORCH_BOX(&int4_linear_dx));
}

}  // namespace entrenar
