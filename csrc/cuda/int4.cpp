// int4_quantize and int4_dequantize on CUDA.
#include "int4.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../arguments.h"
#include "device.h"
#include "product.h"

namespace entrenar {

namespace {

std::tuple<Tensor, Tensor> int4_quantize(const Tensor& weight, int64_t block, ScalarType scale_dtype, bool mse) {
  const Int4Sizes sizes = int4_sizes(weight, block, scale_dtype);
  const Dtype dtype = dtype_of(weight, "weight");
  const Tensor contiguous = torch::stable::contiguous(weight);
  Tensor codes = torch::stable::new_empty(weight, {weight.size(0), sizes.code_bytes}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(weight, {weight.size(0), sizes.scale_bytes}, ScalarType::Byte);
  const OnDevice device(weight);
  device.check(int4_quantize_cuda(contiguous.const_data_ptr(), dtype, weight.size(0), weight.size(1),
                                  static_cast<int>(block), sizes.float32_scales, mse,
                                  codes.mutable_data_ptr<uint8_t>(), scales.mutable_data_ptr(), device.stream()));
  return {codes, scales};
}

Tensor int4_dequantize(const Tensor& codes, const Tensor& scales, int64_t in_features, int64_t block,
                       ScalarType dtype) {
  const Dtype decoded = decoded_dtype(dtype);
  const Weight w = int4_weight(codes, scales, in_features, block);
  check_device(scales, "scales", codes);
  check_aligned(w);
  Tensor out = torch::stable::new_empty(codes, {w.rows, in_features}, dtype);
  const OnDevice device(codes);
  device.check(int4_dequantize_cuda(w, decoded, out.mutable_data_ptr(), in_features, device.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("int4_quantize", TORCH_BOX(&int4_quantize));
  m.impl("int4_dequantize", TORCH_BOX(&int4_dequantize));
}

}  // namespace entrenar
