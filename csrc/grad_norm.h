// The norm of many gradients as one vector. Plain C types only.
#pragma once

#include <math.h>
#include <stdint.h>

#include "int4.h"
#include "weight.h"

namespace entrenar {

// A tensor's squares are summed in float32 within pieces of so many elements, and pieces in float64, in their order.
constexpr int64_t kNormPiece = 4096;

struct NormTensor {
  const void* data;
  int64_t size;
  Dtype dtype;
};

// By what gradients of this norm are multiplied so that it becomes max_norm at most, as torch.nn.utils.clip_grad_norm_
// does; NaN if the norm is not finite.
INT4_HD float clip_factor(double norm, double max_norm) {
  if (!(norm <= 3.40282346638528859812e38)) return int4::bits_float(0x7fc00000);
  const double factor = max_norm / (norm + 1e-6);
  return factor < 1 ? (float)factor : 1.0f;
}

}  // namespace entrenar
