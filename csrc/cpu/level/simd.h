// Vectors of the level's width, in the compiler's own vector types: one source for every instruction set.
#pragma once

#include <stdint.h>

#include "../../int4.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vhalfword __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vbyte __attribute__((vector_size(kLanes)));

template <class V, class T>
inline V load(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}

inline vuint bits_of(vfloat value) { return (vuint)value; }

inline vfloat broadcast(float value) { return value - (vfloat){}; }

// float32 to bfloat16, half to even, for finite values; in the low half of each lane.
inline vuint bfloat16_bits(vfloat value) {
  const vuint bits = bits_of(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline vfloat round_to_bfloat16(vfloat value) { return (vfloat)(bfloat16_bits(value) << 16); }

inline vfloat load_bfloat16(const uint16_t* from) {
  return (vfloat)(__builtin_convertvector(load<vhalfword>(from), vuint) << 16);
}

inline void store_bfloat16(uint16_t* to, vfloat value) {
  const vuint bits = bits_of(value), rounded = bfloat16_bits(value);
  const vuint nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
  store(to, __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, vhalfword));
}

inline float sum(vfloat value) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += value[i];
  return total;
}

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  return int4::half_to_float(half);
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  return int4::float_to_half(value);
#endif
}

}  // namespace
