// Gradients of softmax and its logarithm, along rows: dx = y (dy - Σ dy y), and dx = dy - e^y Σ dy.
#pragma once

#include "elements.h"
#include "math.h"

namespace {

template <Dtype dtype>
void softmax_backward_in(bool log, int64_t columns, int64_t row_begin, int64_t row_end, const void* dy, const void* y,
                         void* dx) {
  for (int64_t row = row_begin; row < row_end; row++) {
    const auto* dys = (const Element<dtype>*)dy + row * columns;
    const auto* ys = (const Element<dtype>*)y + row * columns;
    auto* dxs = (Element<dtype>*)dx + row * columns;
    float total;
    if (log) {
      sum_vectors<1>(columns, &total, [&](int64_t i, int64_t count, vfloat* sums) INLINE {
        sums[0] += load_some<dtype>(dys + i, count);
      });
      for_vectors(columns, [&](int64_t i, int64_t count) INLINE {
        store_some<dtype>(dxs + i, load_some<dtype>(dys + i, count) - vexp(load_some<dtype>(ys + i, count)) * total,
                          count);
      });
    } else {
      sum_vectors<1>(columns, &total, [&](int64_t i, int64_t count, vfloat* sums) INLINE {
        sums[0] += load_some<dtype>(dys + i, count) * load_some<dtype>(ys + i, count);
      });
      for_vectors(columns, [&](int64_t i, int64_t count) INLINE {
        store_some<dtype>(dxs + i, load_some<dtype>(ys + i, count) * (load_some<dtype>(dys + i, count) - total), count);
      });
    }
  }
}

void softmax_backward(bool log, Dtype dtype, int64_t columns, int64_t row_begin, int64_t row_end, const void* dy,
                      const void* y, void* dx) {
  FOR_DTYPE(dtype, softmax_backward_in, log, columns, row_begin, row_end, dy, y, dx);
}

}  // namespace
