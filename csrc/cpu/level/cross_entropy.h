// Cross-entropy of rows of logits with one right class each, and its gradient softmax(logits) - onehot(target).
#pragma once

#include "kernels.h"
#include "math.h"
#include "simd.h"

namespace {

using namespace entrenar;

inline vfloat load_logits(const float* from) { return load<vfloat>(from); }
inline vfloat load_logits(const uint16_t* from) { return load_bfloat16(from); }
inline void store_logits(float* to, vfloat value) { store(to, value); }
inline void store_logits(uint16_t* to, vfloat value) {
#if defined(__AVX512BF16__)
  const __m512bh rounded = (__m512bh)_mm512_cvtne2ps_pbh((__m512)value, (__m512)value);
  store(to, (vhalfword)_mm512_castsi512_si256((__m512i)rounded));
#else
  store_bfloat16(to, value);
#endif
}

// Fewer logits than there are lanes; the other lanes get -infinity, which counts neither in a maximum nor in a sum.
template <class T>
inline vfloat load_logits(const T* from, int64_t count) {
  T padded[kLanes];
  store_logits(padded, broadcast(-__builtin_inff()));
  __builtin_memcpy(padded, from, count * sizeof(T));
  return load_logits(padded);
}

template <class T>
inline void store_logits(T* to, vfloat value, int64_t count) {
  T padded[kLanes];
  store_logits(padded, value);
  __builtin_memcpy(to, padded, count * sizeof(T));
}

constexpr int kLogitVectors = 4;  // at once: independent sums hide the latency of each
constexpr int kLogitStep = kLogitVectors * kLanes;

template <class T>
float highest_logit(const T* logits, int64_t classes) {
  vfloat highest[kLogitVectors];
  for (int v = 0; v < kLogitVectors; v++) highest[v] = broadcast(-__builtin_inff());
  int64_t c = 0;
  for (; c + kLogitStep <= classes; c += kLogitStep) {
    prefetch_ahead(logits + c, kLogitStep * sizeof *logits);
#pragma GCC unroll 4
    for (int v = 0; v < kLogitVectors; v++) {
      const vfloat x = load_logits(logits + c + v * kLanes);
      highest[v] = x > highest[v] ? x : highest[v];
    }
  }
  for (; c < classes; c += kLanes) {
    const vfloat x = classes - c < kLanes ? load_logits(logits + c, classes - c) : load_logits(logits + c);
    highest[0] = x > highest[0] ? x : highest[0];
  }
  float result = -__builtin_inff();
  for (int v = 0; v < kLogitVectors; v++) {
    for (int i = 0; i < kLanes; i++) result = highest[v][i] > result ? highest[v][i] : result;
  }
  return result;
}

template <class T>
float sum_of_exponentials(const T* logits, int64_t classes, float highest) {
  const vfloat shift = broadcast(highest);
  vfloat total = {};
  int64_t c = 0;
  // Sums of sums: one long sum of small numbers would round each of them at the size of all.
  while (c + kLogitStep <= classes) {
    vfloat part[kLogitVectors] = {};
    const int64_t end = classes - c < 16 * kLogitStep ? classes : c + 16 * kLogitStep;
    for (; c + kLogitStep <= end; c += kLogitStep) {
#pragma GCC unroll 4
      for (int v = 0; v < kLogitVectors; v++) part[v] += vexp(load_logits(logits + c + v * kLanes) - shift);
    }
    total += (part[0] + part[1]) + (part[2] + part[3]);
  }
  for (; c < classes; c += kLanes) {
    const vfloat x = classes - c < kLanes ? load_logits(logits + c, classes - c) : load_logits(logits + c);
    total += vexp(x - shift);
  }
  return sum(total);
}

template <class T>
void cross_entropy_row(const T* logits, int64_t classes, int64_t target, float scale, T* gradient, float* loss) {
  const float highest = highest_logit(logits, classes);
  const float total = sum_of_exponentials(logits, classes, highest);
  const float at_target = load_logits(logits + target, 1)[0] - highest;
  if (loss) *loss = (float)(__builtin_log(total) - at_target);
  if (!gradient) return;

  const vfloat shift = broadcast(highest), factor = broadcast(scale / total);
  int64_t c = 0;
  for (; c + kLanes <= classes; c += kLanes) {
    store_logits(gradient + c, vexp(load_logits(logits + c) - shift) * factor);
  }
  if (c < classes) {
    store_logits(gradient + c, vexp(load_logits(logits + c, classes - c) - shift) * factor, classes - c);
  }
  // From the logit again, for what was stored may have been rounded.
  const float probability = vexp(broadcast(at_target))[0] / total;
  store_logits(gradient + target, broadcast(scale * (probability - 1)), 1);
}

template <class T>
void cross_entropy_of(const CrossEntropy* p, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row++) {
    const int64_t target = p->targets[row];
    T* gradient = p->gradient ? (T*)p->gradient + row * p->classes : nullptr;
    float* loss = p->losses ? p->losses + row : nullptr;
    if (target == p->ignore_index) {
      if (gradient) __builtin_memset(gradient, 0, p->classes * sizeof(T));
      if (loss) *loss = 0;
    } else {
      const float scale = p->scales ? p->scales[row] : 1;
      cross_entropy_row((const T*)p->logits + row * p->classes, p->classes, target, scale, gradient, loss);
    }
  }
}

void cross_entropy(const CrossEntropy* p, int64_t row_begin, int64_t row_end) {
  (p->dtype == kFloat32 ? cross_entropy_of<float> : cross_entropy_of<uint16_t>)(p, row_begin, row_end);
}

}  // namespace
