// The end of a product: sums become elements of y.
#pragma once

#include "elements.h"
#include "kernels.h"

namespace {

using namespace entrenar;

// Elements of y from the sums of columns [column, column + kLanes).
inline vfloat finished(const Product& p, int64_t column, const float* sums) {
  const vfloat value = p.scale * load<vfloat>(sums);
  return p.bias ? value + load<vfloat>(p.bias + column) : value;
}

inline void store_vector(const Product& p, int64_t index, vfloat value) {
  p.dtype == kFloat32 ? store((float*)p.y + index, value) : store_bfloat16((uint16_t*)p.y + index, value);
}

// Columns [column, column + columns) of a row of y. The sums are readable up to a whole vector.
inline void store_columns(const Product& p, int64_t row, int64_t column, int64_t columns, const float* sums) {
  const int64_t index = row * p.columns + column;
  int64_t c = 0;
#if defined(__AMX_BF16__)
  for (; p.far && p.dtype == kBFloat16 && c + 2 * kLanes <= columns; c += 2 * kLanes) {
    stream_bfloat16((uint16_t*)p.y + index + c, finished(p, column + c, sums + c),
                    finished(p, column + c + kLanes, sums + c + kLanes));
  }
#endif
  for (; c + kLanes <= columns; c += kLanes) store_vector(p, index + c, finished(p, column + c, sums + c));
  if (c == columns) return;
  const int64_t count = columns - c;
  float bias[kLanes] = {};
  if (p.bias) __builtin_memcpy(bias, p.bias + column + c, count * sizeof(float));
  const vfloat value = p.scale * load<vfloat>(sums + c) + load<vfloat>(bias);
  if (p.dtype == kFloat32) {
    __builtin_memcpy((float*)p.y + index + c, &value, count * sizeof(float));
  } else {
    uint16_t rounded[kLanes];
    store_bfloat16(rounded, value);
    __builtin_memcpy((uint16_t*)p.y + index + c, rounded, count * sizeof(uint16_t));
  }
}

// Whole vectors of rows of y from `row` and `column` on, while their sums are in registers.
template <Dtype dtype, int kRows, int kVectors>
INLINE inline void store_y(const vfloat (&total)[kRows][kVectors], const Product& p, int64_t row, int64_t column) {
  const int64_t stride = p.columns;
  const float scale = p.scale;
  vfloat bias[kVectors] = {};
  for (int v = 0; v < kVectors && p.bias; v++) bias[v] = load<vfloat>(p.bias + column + v * kLanes);
  auto* y = (Element<dtype>*)p.y + row * stride + column;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store_vector<dtype>(y + r * stride + v * kLanes, scale * total[r][v] + bias[v]);
  }
}

}  // namespace
