// Optimizer steps of float32, bfloat16 and float16 tensors, computed in float32 and rounded once each. Compiled without
// fusing multiplications with additions, which the base level could not do.
#pragma once

#include "codes8bit.h"
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

struct VectorMath {
  template <class T>
  static vfloat mul(vfloat a, T b) {
    return a * b;
  }
  static vfloat sqrt(vfloat value) { return vsqrt(value); }
  static vfloat sign(vfloat value) {
    const vfloat one = (vfloat)((bits_of(value) & 0x80000000) | 0x3f800000);
    return value > 0 || value < 0 ? one : value;
  }
};

template <Dtype dtype>
inline void store_param(const OptimCall& call, const OptimStep& step, Element<dtype>* to, vfloat value, vfloat grad,
                        int64_t index, int64_t count) {
  if constexpr (dtype == kBFloat16) {
    if (call.stochastic) {
      const vuint draw = optim_draw((vuint)lane_numbers() + (uint32_t)index, step.key, bits_of(grad));
      const vuint bits = bits_of(value);
      const vuint moved = (bits + draw) & 0xffff0000;
      value = (vfloat)((bits & 0x7fffffff) > 0x7f800000 ? bits : moved);  // NaN stays
    }
  }
  store_some<dtype>(to, value, count);
}

template <Rule rule, Dtype dtype, Dtype state_dtype>
void step_floats(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
                 int64_t end) {
  auto* params = (Element<dtype>*)t.param;
  const auto* grads = (const Element<dtype>*)t.grad;
  auto* as = (Element<state_dtype>*)t.states[0];
  auto* bs = (Element<state_dtype>*)t.states[1];
  for_vectors(end - begin, [&](int64_t offset, int64_t count) INLINE {
    const int64_t i = begin + offset;
    const vfloat grad = load_some<dtype>(grads + i, count);
    vfloat param = load_some<dtype>(params + i, count), a = {}, b = {};
    if (rule != kSGD || call.states) a = load_some<state_dtype>(as + i, count);
    if (rule == kAdam) b = load_some<state_dtype>(bs + i, count);
    optim_update<rule, VectorMath>(step, call.states, grad * factor, param, a, b);
    store_param<dtype>(call, step, params + i, param, grad, i, count);
    if (rule != kSGD || call.states) store_some<state_dtype>(as + i, a, count);
    if (rule == kAdam) store_some<state_dtype>(bs + i, b, count);
  });
}

// The codes of a block's state, whose values are in `values` and whose largest magnitude is in `most`.
template <bool with_sign>
inline void store_codes(const Codebook& book, const float* values, vfloat most, int64_t count, uint8_t* codes,
                        float* absmax) {
  float size = largest(most);
  if (size < kLeastAbsmax) size = 0;
  *absmax = size;
  const float inverse = size ? 1 / size : 0;
  for_vectors(count, [&](int64_t i, int64_t n) INLINE {
    const vbyte encoded = encode<with_sign>(book, load<vfloat>(values + i) * inverse);
    if (n == kLanes) {
      store(codes + i, encoded);
    } else {
      __builtin_memcpy(codes + i, &encoded, n);
    }
  });
}

inline vfloat load_codes(const Codebook& book, const uint8_t* codes, float absmax, int zero, int64_t count) {
  if (count == kLanes) return decode(book, codes) * absmax;
  uint8_t padded[kLanes];
  __builtin_memset(padded, zero, kLanes);
  __builtin_memcpy(padded, codes, count);
  return decode(book, padded) * absmax;
}

template <Rule rule, Dtype dtype>
void step_codes(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
                int64_t end) {
  constexpr int64_t kAhead = 4 * kCodeBlock;
  auto* params = (Element<dtype>*)t.param;
  const auto* grads = (const Element<dtype>*)t.grad;
  for (int64_t block = begin; block < end; block += kCodeBlock) {
    const int64_t size = end - block < kCodeBlock ? end - block : kCodeBlock, number = block / kCodeBlock;
    uint8_t *a_codes = (uint8_t*)t.states[0] + block, *b_codes = (uint8_t*)t.states[1] + block;
    alignas(64) float as[kCodeBlock], bs[kCodeBlock];
    vfloat a_most = {}, b_most = {};
    for_vectors(size, [&](int64_t offset, int64_t count) INLINE {
      const int64_t i = block + offset;
      __builtin_prefetch(params + i + kAhead, 1);
      __builtin_prefetch(grads + i + kAhead);
      const vfloat grad = load_some<dtype>(grads + i, count);
      vfloat param = load_some<dtype>(params + i, count), b = {};
      vfloat a = load_codes(*call.codebooks[0], a_codes + offset, t.absmaxes[0][number], kZeroCode, count);
      if (rule == kAdam) b = load_codes(*call.codebooks[1], b_codes + offset, t.absmaxes[1][number], 0, count);
      optim_update<rule, VectorMath>(step, 1, grad * factor, param, a, b);
      store_param<dtype>(call, step, params + i, param, grad, i, count);
      store(as + offset, a);
      a_most = larger(magnitude(a), a_most);  // NaN does not count
      if (rule == kAdam) {
        store(bs + offset, b);
        b_most = larger(b, b_most);
      }
    });
    store_codes<true>(*call.codebooks[0], as, a_most, size, a_codes, t.absmaxes[0] + number);
    if (rule == kAdam) store_codes<false>(*call.codebooks[1], bs, b_most, size, b_codes, t.absmaxes[1] + number);
  }
}

template <Rule rule, Dtype dtype>
void step_dtype(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
                int64_t end) {
  if (call.codes) return step_codes<rule, dtype>(call, step, factor, t, begin, end);
  if (call.state_dtype == dtype) return step_floats<rule, dtype, dtype>(call, step, factor, t, begin, end);
  step_floats<rule, dtype, kFloat32>(call, step, factor, t, begin, end);
}

template <Dtype dtype>
void step_rule(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& t, int64_t begin,
               int64_t end) {
  switch (call.rule) {
    case kSGD: return step_dtype<kSGD, dtype>(call, step, factor, t, begin, end);
    case kAdam: return step_dtype<kAdam, dtype>(call, step, factor, t, begin, end);
    case kLion: return step_dtype<kLion, dtype>(call, step, factor, t, begin, end);
  }
}

inline void optim(const OptimCall* call, const OptimStep* step, const OptimTensor* tensor, int64_t begin, int64_t end) {
  const float factor = step->sign * (call->factor ? *call->factor : 1.0f);
  FOR_DTYPE(call->dtype, step_rule, *call, *step, factor, *tensor, begin, end);
}

// In 64 sums whatever the level, so that each gives the same bits.
template <Dtype dtype>
float square_sum_in(const void* data, int64_t begin, int64_t end) {
  constexpr int kChains = 64 / kLanes;
  const auto* from = (const Element<dtype>*)data + begin;
  vfloat sums[kChains] = {};
  const int64_t size = end - begin;
  int64_t i = 0;
  for (; i + 64 <= size; i += 64) {
#pragma GCC unroll 16
    for (int chain = 0; chain < kChains; chain++) {
      const vfloat value = load_vector<dtype>(from + i + chain * kLanes);
      sums[chain] += value * value;
    }
  }
  for (int chain = 0; i < size; chain++, i += kLanes) {
    const vfloat value = load_some<dtype>(from + i, size - i);
    sums[chain] += value * value;
  }
  float all[64];
  for (int chain = 0; chain < kChains; chain++) store(all + chain * kLanes, sums[chain]);
  for (int width = 32; width > 0; width /= 2) {
    for (int j = 0; j < width; j++) all[j] += all[j + width];
  }
  return all[0];
}

inline float square_sum(Dtype dtype, const void* data, int64_t begin, int64_t end) {
  FOR_DTYPE(dtype, square_sum_in, data, begin, end);
  return 0;
}

}  // namespace
