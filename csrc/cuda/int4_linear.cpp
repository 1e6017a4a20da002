// int4_linear: y = x Wᵀ + b.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../arguments.h"
#include "device.h"
#include "dot.h"

namespace entrenar {

namespace {

Tensor int4_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, std::optional<Tensor> bias,
                   int64_t block, bool) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  const Tensor input = packed(x);
  const Dtype dtype = dtype_of(input, "x");
  const Weight w = int4_weight(codes, scales, x.size(-1), block);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = w.rows;
  Tensor y = torch::stable::new_empty(input, sizes);
  const int64_t rows = w.rows == 0 ? 0 : y.numel() / w.rows;
  STD_TORCH_CHECK(int4_dot_takes(w, dtype, rows), "x must have few rows, and codes must be aligned to 16 bytes");
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->dim() == 1 &&
                        bias->size(0) == w.rows,
                    "bias must be float32 [", w.rows, "] and contiguous");
  }
  const OnDevice device(x);
  device.check(int4_dot_cuda(w, dtype, input.const_data_ptr(), rows, bias ? bias->const_data_ptr<float>() : nullptr,
                             y.mutable_data_ptr(), device.stream()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) { m.impl("int4_linear", TORCH_BOX(&int4_linear)); }

}  // namespace entrenar
