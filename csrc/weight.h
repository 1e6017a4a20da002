// What kernels of every device multiply by. Plain C types only.
#pragma once

#include <stdint.h>

namespace entrenar {

enum Dtype { kFloat32, kBFloat16, kFloat16 };

// A matrix: int4 codes with their scales, or dense float32 where codes is null.
struct Weight {
  const uint8_t* codes;
  const void* scales;
  bool float32_scales;
  int block;
  const float* dense;
  int64_t rows, columns;
};

}  // namespace entrenar
