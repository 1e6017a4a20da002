// int4_quantize and int4_dequantize.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "dispatch.h"
#include "product.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

int64_t grain_of(int64_t columns) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns)); }

std::tuple<Tensor, Tensor> int4_quantize(const Tensor& weight, int64_t block, ScalarType scale_dtype, bool mse) {
  const Int4Sizes sizes = int4_sizes(weight, block, scale_dtype);
  const Dtype dtype = dtype_of(weight, "weight");
  const Tensor contiguous = torch::stable::contiguous(weight);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  Tensor codes = torch::stable::new_empty(weight, {rows, sizes.code_bytes}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(weight, {rows, sizes.scale_bytes}, ScalarType::Byte);

  const auto* from = static_cast<const char*>(contiguous.const_data_ptr());
  auto* to_codes = codes.mutable_data_ptr<uint8_t>();
  auto* to_scales = scales.mutable_data_ptr<uint8_t>();
  const int64_t row_bytes = columns * (dtype == kFloat32 ? 4 : 2);
  parallel_for(0, rows, grain_of(columns), [&](int64_t begin, int64_t end) {
    kernels().quantize(from + begin * row_bytes, dtype, end - begin, columns, static_cast<int>(block),
                       sizes.float32_scales, mse, to_codes + begin * sizes.code_bytes,
                       to_scales + begin * sizes.scale_bytes);
  });
  return {codes, scales};
}

Tensor int4_dequantize(const Tensor& codes, const Tensor& scales, int64_t in_features, int64_t block,
                       ScalarType dtype) {
  const Dtype decoded = decoded_dtype(dtype);
  const Weight w = int4_weight(codes, scales, in_features, block);
  Tensor out = torch::stable::new_empty(codes, {w.rows, in_features}, dtype);
  void* to = out.mutable_data_ptr();
  parallel_for(0, w.rows, grain_of(in_features), [&](int64_t begin, int64_t end) {
    kernels().dequantize(&w, begin, end, decoded, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("int4_quantize", TORCH_BOX(&int4_quantize));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
}

}  // namespace entrenar
