// The arguments of an op, checked, as kernels of every device see them. Each error names the argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "int4.h"
#include "weight.h"

namespace entrenar {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  const auto type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return type == ScalarType::Float ? kFloat32 : kBFloat16;
}

inline Dtype float_dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.get_device_index() == x.get_device_index(), name,
                  " must be on the device of the other tensors");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& x) {
  const auto sizes = tensor.sizes(), expected = x.sizes();
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() &&
                      std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()),
                  name, " must have the shape and dtype of the other tensors");
  check_device(tensor, name, x);
}

inline Tensor packed(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// An uninitialized contiguous tensor of x's shape and dtype.
inline Tensor empty_as(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

// a.shape[:-1] + [last]
inline Tensor empty_with_last(const Tensor& a, int64_t last) {
  std::vector<int64_t> sizes(a.sizes().begin(), a.sizes().end());
  sizes.back() = last;
  return torch::stable::new_empty(a, sizes);
}

// The rows of x, taken as a matrix of its last dimension.
inline int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) rows *= x.size(i);
  return rows;
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t columns) {
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->dim() == 1 &&
                            bias->size(0) == columns),
                  "bias must be float32 with ", columns, " elements");
}

inline Weight int4_weight(const Tensor& codes, const Tensor& scales, int64_t columns, int64_t block) {
  STD_TORCH_CHECK(block == 32 || block == 64, "block must be 32 or 64, not ", block);
  STD_TORCH_CHECK(columns > 0, "a packed weight must have at least one column");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && scales.scalar_type() == ScalarType::Byte,
                  "codes and scales must be uint8");
  STD_TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous(), "codes and scales must be contiguous");
  STD_TORCH_CHECK(codes.dim() == 2 && scales.dim() == 2 && codes.size(0) == scales.size(0),
                  "codes and scales must be matrices with the same number of rows");
  const int64_t blocks = int4::blocks(columns, block);
  STD_TORCH_CHECK(codes.size(1) == int4::row_bytes(columns), "codes must have ", int4::row_bytes(columns),
                  " bytes a row for ", columns, " columns, not ", codes.size(1));
  STD_TORCH_CHECK(scales.size(1) == 2 * blocks || scales.size(1) == 4 * blocks, "scales must have ", 2 * blocks, " or ",
                  4 * blocks, " bytes a row for ", columns, " columns, not ", scales.size(1));
  Weight w = {};
  w.codes = codes.const_data_ptr<uint8_t>();
  w.scales = scales.const_data_ptr<uint8_t>();
  w.float32_scales = scales.size(1) == 4 * blocks;
  w.block = static_cast<int>(block);
  w.rows = codes.size(0);
  w.columns = columns;
  return w;
}

inline Weight dense_weight(const Tensor& weight, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_contiguous(), name,
                  " must be float32 and contiguous");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) == rows && weight.size(1) == columns, name, " must be ", rows,
                  " x ", columns);
  Weight w = {};
  w.dense = weight.const_data_ptr<float>();
  w.rows = rows;
  w.columns = columns;
  return w;
}

inline Dtype decoded_dtype(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be float32 or bfloat16");
  return dtype == ScalarType::Float ? kFloat32 : kBFloat16;
}

// Where int4_quantize writes: checked sizes of the result for a weight [rows, columns].
struct Int4Sizes {
  int64_t code_bytes, scale_bytes;  // of a row
  bool float32_scales;
};

inline Int4Sizes int4_sizes(const Tensor& weight, int64_t block, ScalarType scale_dtype) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be a matrix");
  STD_TORCH_CHECK(block == 32 || block == 64, "block must be 32 or 64, not ", block);
  STD_TORCH_CHECK(scale_dtype == ScalarType::Half || scale_dtype == ScalarType::Float,
                  "scale_dtype must be float16 or float32");
  const bool float32_scales = scale_dtype == ScalarType::Float;
  const int64_t columns = weight.size(1);
  return {int4::row_bytes(columns), int4::blocks(columns, static_cast<int>(block)) * (float32_scales ? 4 : 2),
          float32_scales};
}

}  // namespace entrenar
