// int4_linear: y = x Wᵀ + b, and its gradient dx = dy W.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "product.h"

namespace entrenar {

namespace {

Tensor int4_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, std::optional<Tensor> bias,
                   int64_t block, bool int8) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const Tensor input = torch::stable::contiguous(x);
  const Term term = {input, int4_weight(codes, scales, x.size(-1), block)};
  Tensor y = empty_with_last(input, term.w.rows);
  multiply(&term, 1, true, 1.0f, bias, y, int8 ? rounded_to_int8(input, term.w) : std::nullopt);
  return y;
}

Tensor int4_linear_dx(const Tensor& dy, const Tensor& codes, const Tensor& scales, int64_t in_features,
                      int64_t block) {
  STD_TORCH_CHECK(dy.dim() > 0, "dy must have at least one dimension");
  const Tensor gradient = torch::stable::contiguous(dy);
  const Term term = {gradient, int4_weight(codes, scales, in_features, block)};
  Tensor dx = empty_with_last(gradient, in_features);
  multiply(&term, 1, false, 1.0f, std::nullopt, dx);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("int4_linear", TORCH_BOX(&int4_linear));
  m.impl("int4_linear_dx", TORCH_BOX(&int4_linear_dx));
}

}  // namespace entrenar
