// The end of a product: sums become elements of y.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

// Columns [column, column + columns) of a row of y, at most a tile.
inline void store_columns(const Product& p, int64_t row, int64_t column, int64_t columns, const float* sums) {
  float values[kTileColumns] = {};
  for (int64_t i = 0; i < columns; i++) values[i] = p.scale * sums[i] + (p.bias ? p.bias[column + i] : 0.0f);
  const int64_t index = row * p.columns + column;
  if (p.dtype == kFloat32) {
    __builtin_memcpy((float*)p.y + index, values, columns * sizeof(float));
  } else {
    uint16_t rounded[kTileColumns];
    for (int64_t i = 0; i < columns; i += kLanes) store_bfloat16(rounded + i, load<vfloat>(values + i));
    __builtin_memcpy((uint16_t*)p.y + index, rounded, columns * sizeof(uint16_t));
  }
}

}  // namespace
