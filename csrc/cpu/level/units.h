// Rows of x as the units that the product kernel reads.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

// The bytes of a row, then zeros; without the two calls that this would be for every short row of a head.
INLINE inline void copy_row(const void* from, int64_t bytes, uint32_t* to, int64_t room) {
  int64_t i = 0;
  for (; i + kLanes * 4 <= bytes; i += kLanes * 4) store((char*)to + i, load<vuint>((const char*)from + i));
  if (i < room) {
    __builtin_memcpy((char*)to + i, (const char*)from + i, bytes - i);
    __builtin_memset((char*)to + bytes, 0, room - bytes);
  }
}

void to_units(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool bfloat16_units, uint32_t* out,
              int64_t stride) {
  for (int64_t m = 0; m < rows; m++, out += stride) {
    if (bfloat16_units || dtype == kFloat32) {
      const int64_t bytes = columns * (dtype == kFloat32 ? 4 : 2);
      copy_row((const char*)x + m * bytes, bytes, out, stride * 4);
    } else {
      const uint16_t* from = (const uint16_t*)x + m * columns;
      for (int64_t i = 0; i < columns; i++) out[i] = (uint32_t)from[i] << 16;
      __builtin_memset(out + columns, 0, (stride - columns) * 4);
    }
  }
}

}  // namespace
