// The end of a product: sums become elements of y.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

// Columns [column, column + columns) of a row of y. The sums are readable up to a whole vector.
inline void store_columns(const Product& p, int64_t row, int64_t column, int64_t columns, const float* sums) {
  const int64_t index = row * p.columns + column;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const int64_t count = columns - c < kLanes ? columns - c : kLanes;
    vfloat value = p.scale * load<vfloat>(sums + c);
    if (p.bias) {
      float bias[kLanes] = {};
      __builtin_memcpy(bias, p.bias + column + c, count * sizeof(float));
      value += load<vfloat>(bias);
    }
    if (p.dtype == kFloat32) {
      __builtin_memcpy((float*)p.y + index + c, &value, count * sizeof(float));
    } else {
      uint16_t* y = (uint16_t*)p.y + index + c;
      uint16_t rounded[kLanes];
      store_bfloat16(count == kLanes ? y : rounded, value);
      if (count < kLanes) __builtin_memcpy(y, rounded, count * sizeof(uint16_t));
    }
  }
}

}  // namespace
