// int4_quantize and int4_dequantize.
#include "../int4.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <tuple>

#include "dispatch.h"
#include "product.h"

namespace entrenar {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

int64_t grain_of(int64_t columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)); }

std::tuple<Tensor, Tensor> int4_quantize(const Tensor& weight, int64_t block, ScalarType scale_dtype) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  STD_TORCH_CHECK(block == 32 || block == 64, "block must be 32 or 64, not ", block);
  STD_TORCH_CHECK(scale_dtype == ScalarType::Half || scale_dtype == ScalarType::Float,
                  "scale_dtype must be float16 or float32");
  const Dtype dtype = dtype_of(weight, "weight");
  const Tensor contiguous = torch::stable::contiguous(weight);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const bool float32_scales = scale_dtype == ScalarType::Float;
  const int64_t code_bytes = int4::row_bytes(columns);
  const int64_t scale_bytes = int4::blocks(columns, static_cast<int>(block)) * (float32_scales ? 4 : 2);
  Tensor codes = torch::stable::new_empty(weight, {rows, code_bytes}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(weight, {rows, scale_bytes}, ScalarType::Byte);

  const auto* from = static_cast<const char*>(contiguous.const_data_ptr());
  auto* to_codes = codes.mutable_data_ptr<uint8_t>();
  auto* to_scales = scales.mutable_data_ptr<uint8_t>();
  const int64_t row_bytes = columns * (dtype == kFloat32 ? 4 : 2);
  parallel_for(0, rows, grain_of(columns), [&](int64_t begin, int64_t end) {
    kernels().quantize(from + begin * row_bytes, dtype, end - begin, columns, static_cast<int>(block), float32_scales,
                       to_codes + begin * code_bytes, to_scales + begin * scale_bytes);
  });
  return {codes, scales};
}

Tensor int4_dequantize(const Tensor& codes, const Tensor& scales, int64_t in_features, int64_t block,
                       ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be float32 or bfloat16");
  const Weight w = int4_weight(codes, scales, in_features, block);
  Tensor out = torch::stable::new_empty(codes, {w.rows, in_features}, dtype);
  void* to = out.mutable_data_ptr();
  parallel_for(0, w.rows, grain_of(in_features), [&](int64_t begin, int64_t end) {
    kernels().dequantize(&w, begin, end, dtype == ScalarType::Float ? kFloat32 : kBFloat16, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("int4_quantize", TORCH_BOX(&int4_quantize));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
}

}  // namespace entrenar
