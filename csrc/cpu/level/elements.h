// Vectors of float32 from and to arrays of any element type, also of fewer elements than a vector has lanes.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

template <Dtype dtype>
struct ElementOf {
  typedef uint16_t Type;
};
template <>
struct ElementOf<kFloat32> {
  typedef float Type;
};
template <Dtype dtype>
using Element = typename ElementOf<dtype>::Type;

inline vfloat load_float16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps((__m256i)load<vhalfword>(from));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps((__m128i)load<vhalfword>(from));
#else
  vfloat value;
  for (int i = 0; i < kLanes; i++) value[i] = half_to_float(from[i]);
  return value;
#endif
}

inline void store_float16(uint16_t* to, vfloat value) {
#if defined(__AVX512F__)
  store(to, (vhalfword)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(to, (vhalfword)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; i++) to[i] = float_to_half(value[i]);
#endif
}

template <Dtype dtype>
inline vfloat load_vector(const Element<dtype>* from) {
  if constexpr (dtype == kFloat32) {
    return load<vfloat>(from);
  } else {
    return dtype == kBFloat16 ? load_bfloat16(from) : load_float16(from);
  }
}

template <Dtype dtype>
inline void store_vector(Element<dtype>* to, vfloat value) {
  if constexpr (dtype == kFloat32) {
    store(to, value);
  } else {
    dtype == kBFloat16 ? store_bfloat16(to, value) : store_float16(to, value);
  }
}

inline vint lane_numbers() {
  vint numbers = {};
  for (int i = 0; i < kLanes; i++) numbers[i] = i;
  return numbers;
}

// `value` in the lanes whose bits are set, and `other` elsewhere.
inline vfloat choose(uint64_t bits, vfloat value, vfloat other) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_mask_blend_ps((__mmask16)bits, (__m512)other, (__m512)value);
#else
  const vint lane = 1 << lane_numbers();
  return (lane & (int32_t)bits) != 0 ? value : other;
#endif
}

// The first `count` elements, and zeros in the other lanes.
template <Dtype dtype>
inline vfloat load_some(const Element<dtype>* from, int64_t count) {
  prefetch_ahead(from, kLanes * sizeof *from);
  if (count >= kLanes) return load_vector<dtype>(from);
  Element<dtype> padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof *from);
  return load_vector<dtype>(padded);
}

template <Dtype dtype>
inline void store_some(Element<dtype>* to, vfloat value, int64_t count) {
  if (count >= kLanes) return store_vector<dtype>(to, value);
  Element<dtype> padded[kLanes];
  store_vector<dtype>(padded, value);
  __builtin_memcpy(to, padded, count * sizeof *to);
}

// The first `count` lanes, and zeros in the others.
inline vfloat keep_some(vfloat value, int64_t count) {
  if (count >= kLanes) return value;
  for (int i = count; i < kLanes; i++) value[i] = 0;
  return value;
}

// body(i, count) for the vectors of [0, size): element i is the first of `count` ones.
template <class Body>
inline void for_vectors(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, size - i);
}

// totals[s] = sum over i in [0, size) of the s-th of the terms that body(i, count, terms) adds to.
template <int kSums, class Body>
inline void sum_vectors(int64_t size, float* totals, Body body) {
  constexpr int kChains = 4;  // a sum waits for the one before it
  vfloat sums[kChains][kSums] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; chain++) body(i + chain * kLanes, kLanes, sums[chain]);
  }
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes, sums[0]);
  if (i < size) body(i, size - i, sums[0]);
  for (int s = 0; s < kSums; s++) totals[s] = sum((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
}

// Calls function<dtype>(arguments...) for a dtype that is known only at run time.
#define FOR_DTYPE(dtype, function, ...)                                 \
  switch (dtype) {                                                      \
    case kFloat32: return function<kFloat32>(__VA_ARGS__);              \
    case kBFloat16: return function<kBFloat16>(__VA_ARGS__);            \
    case kFloat16: return function<kFloat16>(__VA_ARGS__);              \
  }

}  // namespace
