// AdamW steps of float32, bfloat16 and float16 tensors, computed in float32 and rounded once each.
#pragma once

#include "elements.h"

namespace {

inline vfloat vsqrt(vfloat value) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX2__)
  return (vfloat)_mm256_sqrt_ps((__m256)value);
#else
  for (int i = 0; i < kLanes; i++) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

template <Dtype dtype>
void adamw_in(const AdamWStep* step, const AdamWTensor* tensor, int64_t begin, int64_t end) {
  auto* params = (Element<dtype>*)tensor->param + begin;
  const auto* grads = (const Element<dtype>*)tensor->grad + begin;
  auto* exp_avgs = (Element<dtype>*)tensor->exp_avg + begin;
  auto* exp_avg_sqs = (Element<dtype>*)tensor->exp_avg_sq + begin;
  for_vectors(end - begin, [&](int64_t i, int64_t count) INLINE {
    vfloat param = load_some<dtype>(params + i, count), exp_avg = load_some<dtype>(exp_avgs + i, count);
    vfloat exp_avg_sq = load_some<dtype>(exp_avg_sqs + i, count);
    adamw_update(*step, load_some<dtype>(grads + i, count), param, exp_avg, exp_avg_sq, vsqrt);
    store_some<dtype>(params + i, param, count);
    store_some<dtype>(exp_avgs + i, exp_avg, count);
    store_some<dtype>(exp_avg_sqs + i, exp_avg_sq, count);
  });
}

void adamw(const AdamWStep* step, Dtype dtype, const AdamWTensor* tensor, int64_t begin, int64_t end) {
  FOR_DTYPE(dtype, adamw_in, step, tensor, begin, end);
}

}  // namespace
