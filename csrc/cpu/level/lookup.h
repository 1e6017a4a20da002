// Elements of a table of float32 by a vector of indices.
#pragma once

#include "simd.h"

namespace {

// table[index[i] mod size] in lane i.
template <int size>
inline vfloat lookup(const float* table, vint index) {
#if defined(__AVX512F__)
  if constexpr (size == 16) return (vfloat)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
  if constexpr (size == 32) {
    return (vfloat)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
  }
#endif
  // Word by word, by indices that go through memory: AVX2's gather takes several times as long on many processors, and
  // taking a vector apart twice as long.
  alignas(sizeof index) int32_t at[kLanes];
  store(at, index & (size - 1));
  asm("" : "+m"(at));
  vfloat value;
  for (int i = 0; i < kLanes; i++) value[i] = table[at[i]];
  return value;
}

}  // namespace
