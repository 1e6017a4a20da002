// Rotary position embedding: y = x cos + R x sin with R (a, b) = (-b, a), and its transpose y = x cos - R (x sin).
#pragma once

#include "elements.h"

namespace {

template <Dtype dtype>
void rotary_in(const Rotary& r, int64_t row_begin, int64_t row_end) {
  int64_t index[3] = {row_begin / (r.sizes[1] * r.sizes[2]), row_begin / r.sizes[2] % r.sizes[1],
                      row_begin % r.sizes[2]};
  for (int64_t row = row_begin; row < row_end; row++) {
    int64_t at[Rotary::kTensors];
    for (int t = 0; t < Rotary::kTensors; t++) {
      at[t] = index[0] * r.strides[t][0] + index[1] * r.strides[t][1] + index[2] * r.strides[t][2];
    }
    const auto* x = (const Element<dtype>*)r.x + at[Rotary::kX];
    const auto* cos = (const Element<dtype>*)r.cos + at[Rotary::kCos];
    const auto* sin = (const Element<dtype>*)r.sin + at[Rotary::kSin];
    auto* y = (Element<dtype>*)r.y + at[Rotary::kY];
    for_vectors(r.half, [&](int64_t i, int64_t count) INLINE {
      const int64_t j = i + r.half;
      const vfloat a = load_some<dtype>(x + i, count), b = load_some<dtype>(x + j, count);
      const vfloat cos_a = load_some<dtype>(cos + i, count), cos_b = load_some<dtype>(cos + j, count);
      const vfloat sin_a = load_some<dtype>(sin + i, count), sin_b = load_some<dtype>(sin + j, count);
      store_some<dtype>(y + i, r.transposed ? a * cos_a + b * sin_b : a * cos_a - b * sin_a, count);
      store_some<dtype>(y + j, r.transposed ? b * cos_b - a * sin_a : b * cos_b + a * sin_b, count);
    });
    for (int d = 2; ++index[d] == r.sizes[d] && d > 0; d--) index[d] = 0;
  }
}

void rotary(const Rotary* r, int64_t row_begin, int64_t row_end) {
  FOR_DTYPE(r->dtype, rotary_in, *r, row_begin, row_end);
}

}  // namespace
