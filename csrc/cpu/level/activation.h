// Gradients of activation functions, and SwiGLU.
#pragma once

#include "elements.h"
#include "math.h"

namespace {

template <Binary f>
inline vfloat binary_of(vfloat a, vfloat b) {
  if constexpr (f == kSiluBackward) {
    const vfloat s = vsigmoid(b);
    return a * (s * (1.0f + b * (1.0f - s)));
  } else if constexpr (f == kGeluBackward) {
    const Normal normal = vnormal(b);
    return a * (normal.distribution + b * normal.density);
  } else if constexpr (f == kGeluTanhBackward) {
    constexpr float kSlope = 0.7978845608f, kCubic = 0.044715f;  // √(2/π)
    const vfloat square = b * b;
    const vfloat s = vsigmoid(2 * kSlope * (b + kCubic * (square * b)));  // (1 + tanh u) / 2 = σ(2u)
    return a * (s + b * (2.0f * s) * (1.0f - s) * (kSlope * (1.0f + 3 * kCubic * square)));
  } else if constexpr (f == kSigmoidBackward) {
    return a * (1.0f - b) * b;
  } else if constexpr (f == kTanhBackward) {
    return a * (1.0f - b * b);
  } else {
    static_assert(f == kSwiGLU);
    return a * vsigmoid(a) * b;
  }
}

template <Dtype dtype, Binary f>
void binary_to(int64_t begin, int64_t end, const void* a, const void* b, void* out) {
  const auto* as = (const Element<dtype>*)a + begin;
  const auto* bs = (const Element<dtype>*)b + begin;
  auto* to = (Element<dtype>*)out + begin;
  for_vectors(end - begin, [&](int64_t i, int64_t count) INLINE {
    store_some<dtype>(to + i, binary_of<f>(load_some<dtype>(as + i, count), load_some<dtype>(bs + i, count)), count);
  });
}

template <Dtype dtype>
void binary_in(Binary f, int64_t begin, int64_t end, const void* a, const void* b, void* out) {
  switch (f) {
    case kSiluBackward: return binary_to<dtype, kSiluBackward>(begin, end, a, b, out);
    case kGeluBackward: return binary_to<dtype, kGeluBackward>(begin, end, a, b, out);
    case kGeluTanhBackward: return binary_to<dtype, kGeluTanhBackward>(begin, end, a, b, out);
    case kSigmoidBackward: return binary_to<dtype, kSigmoidBackward>(begin, end, a, b, out);
    case kTanhBackward: return binary_to<dtype, kTanhBackward>(begin, end, a, b, out);
    case kSwiGLU: return binary_to<dtype, kSwiGLU>(begin, end, a, b, out);
  }
}

void binary(Binary f, Dtype dtype, int64_t begin, int64_t end, const void* a, const void* b, void* out) {
  FOR_DTYPE(dtype, binary_in, f, begin, end, a, b, out);
}

template <Dtype dtype>
void swiglu_backward_in(int64_t begin, int64_t end, const void* dy, const void* gate, const void* up, void* dgate,
                        void* dup, void* y) {
  const auto* dys = (const Element<dtype>*)dy + begin;
  const auto* gates = (const Element<dtype>*)gate + begin;
  const auto* ups = (const Element<dtype>*)up + begin;
  auto* dgates = (Element<dtype>*)dgate + begin;
  auto* dups = (Element<dtype>*)dup + begin;
  auto* ys = y ? (Element<dtype>*)y + begin : nullptr;
  for_vectors(end - begin, [&](int64_t i, int64_t count) INLINE {
    const vfloat dy = load_some<dtype>(dys + i, count), g = load_some<dtype>(gates + i, count);
    const vfloat u = load_some<dtype>(ups + i, count), s = vsigmoid(g);
    store_some<dtype>(dgates + i, dy * u * (s * (1.0f + g * (1.0f - s))), count);
    store_some<dtype>(dups + i, dy * (g * s), count);
    if (ys) store_some<dtype>(ys + i, g * s * u, count);
  });
}

void swiglu_backward(Dtype dtype, int64_t begin, int64_t end, const void* dy, const void* gate, const void* up,
                     void* dgate, void* dup, void* y) {
  FOR_DTYPE(dtype, swiglu_backward_in, begin, end, dy, gate, up, dgate, dup, y);
}

}  // namespace
