// Rows of x as the units that the product kernel reads.
#pragma once

#include "kernels.h"

namespace {

using namespace entrenar;

void to_units(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool bfloat16_units, uint32_t* out,
              int64_t stride) {
  for (int64_t m = 0; m < rows; m++, out += stride) {
    if (bfloat16_units || dtype == kFloat32) {
      const int64_t bytes = columns * (dtype == kFloat32 ? 4 : 2);
      __builtin_memcpy(out, (const char*)x + m * bytes, bytes);
      __builtin_memset((char*)out + bytes, 0, stride * 4 - bytes);
    } else {
      const uint16_t* from = (const uint16_t*)x + m * columns;
      for (int64_t i = 0; i < columns; i++) out[i] = (uint32_t)from[i] << 16;
      __builtin_memset(out + columns, 0, (stride - columns) * 4);
    }
  }
}

}  // namespace
