// Normalization of rows, with float32 statistics that the gradients compute anew: a row is in the cache by then.
#pragma once

#include "elements.h"

namespace {

// A row of weights, all 1 where there are none.
template <Dtype dtype>
struct Scale {
  const Element<dtype>* weight;
  vfloat at(int64_t i, int64_t count) const { return weight ? load_some<dtype>(weight + i, count) : broadcast(1.0f); }
};

template <Dtype dtype>
void rms_norm_in(const RMSNorm& n, int64_t row_begin, int64_t row_end) {
  const Scale<dtype> w = {(const Element<dtype>*)n.weight};
  const float inverse = 1.0f / n.columns;
  for (int64_t row = row_begin; row < row_end; row++) {
    const auto* x = (const Element<dtype>*)n.x + row * n.columns;
    if (n.residual) {
      const auto* residual = (const Element<dtype>*)n.residual + row * n.columns;
      auto* to = (Element<dtype>*)n.sum + row * n.columns;
      for_vectors(n.columns, [&](int64_t i, int64_t count) INLINE {
        store_some<dtype>(to + i, load_some<dtype>(x + i, count) + load_some<dtype>(residual + i, count), count);
      });
      x = to;
    }
    float squares;
    sum_vectors<1>(n.columns, &squares, [&](int64_t i, int64_t count, vfloat* sums) INLINE {
      const vfloat value = load_some<dtype>(x + i, count);
      sums[0] += value * value;
    });
    const float r = 1.0f / __builtin_sqrtf(squares * inverse + n.eps);
    auto* y = (Element<dtype>*)n.y + row * n.columns;
    for_vectors(n.columns, [&](int64_t i, int64_t count) INLINE {
      store_some<dtype>(y + i, load_some<dtype>(x + i, count) * r * w.at(i, count), count);
    });
  }
}

void rms_norm(const RMSNorm* n, int64_t row_begin, int64_t row_end) {
  FOR_DTYPE(n->dtype, rms_norm_in, *n, row_begin, row_end);
}

// The vector of dsum at an element of x, zeros where there is none.
template <Dtype dtype>
inline vfloat dsum_at(const NormBackward& n, int64_t index, int64_t count) {
  return n.dsum ? load_some<dtype>((const Element<dtype>*)n.dsum + index, count) : vfloat{};
}

inline void add_to(float* sums, vfloat value) { store(sums, load<vfloat>(sums) + value); }

inline void clear(float* sums, int64_t columns) {
  if (sums) __builtin_memset(sums, 0, sums_stride(columns) * sizeof(float));
}

template <Dtype dtype>
void rms_norm_backward_in(const NormBackward& n, int64_t row_begin, int64_t row_end, float* dw) {
  const Scale<dtype> w = {(const Element<dtype>*)n.weight};
  const float inverse = 1.0f / n.columns;
  clear(dw, n.columns);
  for (int64_t row = row_begin; row < row_end; row++) {
    const int64_t start = row * n.columns;
    const auto* x = (const Element<dtype>*)n.x + start;
    const auto* dy = (const Element<dtype>*)n.dy + start;
    auto* dx = (Element<dtype>*)n.dx + start;
    float totals[2];  // Σ x², Σ g x
    sum_vectors<2>(n.columns, totals, [&](int64_t i, int64_t count, vfloat* sums) INLINE {
      const vfloat value = load_some<dtype>(x + i, count);
      sums[0] += value * value;
      sums[1] += load_some<dtype>(dy + i, count) * w.at(i, count) * value;
    });
    const float r = 1.0f / __builtin_sqrtf(totals[0] * inverse + n.eps);
    const float projection = r * (totals[1] * inverse);
    for_vectors(n.columns, [&](int64_t i, int64_t count) INLINE {
      const vfloat x_hat = load_some<dtype>(x + i, count) * r, gradient = load_some<dtype>(dy + i, count);
      const vfloat through = r * (gradient * w.at(i, count) - x_hat * projection);
      store_some<dtype>(dx + i, dsum_at<dtype>(n, start + i, count) + through, count);
      if (dw) add_to(dw + i, gradient * x_hat);
    });
  }
}

void rms_norm_backward(const NormBackward* n, int64_t row_begin, int64_t row_end, float* dw) {
  FOR_DTYPE(n->dtype, rms_norm_backward_in, *n, row_begin, row_end, dw);
}

template <Dtype dtype>
void layer_norm_backward_in(const NormBackward& n, int64_t row_begin, int64_t row_end, float* dw, float* db) {
  const Scale<dtype> w = {(const Element<dtype>*)n.weight};
  const float inverse = 1.0f / n.columns;
  clear(dw, n.columns);
  clear(db, n.columns);
  for (int64_t row = row_begin; row < row_end; row++) {
    const int64_t start = row * n.columns;
    const auto* x = (const Element<dtype>*)n.x + start;
    const auto* dy = (const Element<dtype>*)n.dy + start;
    auto* dx = (Element<dtype>*)n.dx + start;
    float total;
    sum_vectors<1>(n.columns, &total, [&](int64_t i, int64_t count, vfloat* sums) INLINE {
      sums[0] += load_some<dtype>(x + i, count);
    });
    const float mean = total * inverse;
    float totals[3];  // of the centred x: Σ x², Σ g, Σ g x
    sum_vectors<3>(n.columns, totals, [&](int64_t i, int64_t count, vfloat* sums) INLINE {
      const vfloat centred = keep_some(load_some<dtype>(x + i, count) - mean, count);
      const vfloat g = rounded(load_some<dtype>(dy + i, count) * w.at(i, count));
      sums[0] += centred * centred;
      sums[1] += g;
      sums[2] += g * centred;
    });
    const float r = 1.0f / __builtin_sqrtf(totals[0] * inverse + n.eps);
    const float mean_g = totals[1] * inverse, projection = r * (totals[2] * inverse);
    for_vectors(n.columns, [&](int64_t i, int64_t count) INLINE {
      const vfloat x_hat = (load_some<dtype>(x + i, count) - mean) * r, gradient = load_some<dtype>(dy + i, count);
      // Rounded as it was for its mean, so that what a row has in common cancels: r may be large where rows are constant.
      const vfloat g = rounded(gradient * w.at(i, count));
      store_some<dtype>(dx + i, r * (g - mean_g - x_hat * projection), count);
      if (dw) add_to(dw + i, gradient * x_hat);
      if (db) add_to(db + i, gradient);
    });
  }
}

void layer_norm_backward(const NormBackward* n, int64_t row_begin, int64_t row_end, float* dw, float* db) {
  FOR_DTYPE(n->dtype, layer_norm_backward_in, *n, row_begin, row_end, dw, db);
}

template <Dtype dtype>
void add_sums_in(const float* sums, int64_t chunks, int64_t columns, void* out) {
  for_vectors(columns, [&](int64_t i, int64_t count) INLINE {
    vfloat total = {};
    for (int64_t chunk = 0; chunk < chunks; chunk++) total += load<vfloat>(sums + chunk * sums_stride(columns) + i);
    store_some<dtype>((Element<dtype>*)out + i, total, count);
  });
}

void add_sums(const float* sums, int64_t chunks, int64_t columns, Dtype dtype, void* out) {
  FOR_DTYPE(dtype, add_sums_in, sums, chunks, columns, out);
}

}  // namespace
