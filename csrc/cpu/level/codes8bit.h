// Vectors of 8-bit codes to float32 and back.
#pragma once

#include "../../codes8bit.h"
#include "elements.h"
#include "lookup.h"
#include "math.h"

namespace {

inline vint truncated(vfloat value) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvttps_epi32((__m512)value);
#elif defined(__AVX2__)
  return (vint)_mm256_cvttps_epi32((__m256)value);
#else
  return __builtin_convertvector(value, vint);
#endif
}

inline float largest(vfloat value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float most = value[0];
  for (int i = 1; i < kLanes; i++) most = value[i] > most ? value[i] : most;
  return most;
#endif
}

inline vfloat magnitude(vfloat value) { return (vfloat)(bits_of(value) & 0x7fffffff); }

inline vfloat decode(const Codebook& book, const uint8_t* codes) {
#if defined(__AVX512F__)
  return lookup<kCodes>(book.values, (vint)widen(load<vbyte>(codes)));
#else
  vfloat value;
  for (int i = 0; i < kLanes; i++) value[i] = book.values[codes[i]];
  return value;
#endif
}

// The codes of finite values between -1 and 1, or hardly beyond: the nearest value's, of two equally near the smaller's.
template <bool with_sign>
inline vbyte encode(const Codebook& book, vfloat value) {
  const vfloat size = larger(magnitude(value), broadcast(kLeastMagnitude));
#if defined(__AVX512F__)
  const vint exponent = (vint)size >> 23;
  const vint region =
      (vint)lookup<32>((const float*)book.regions, exponent) - (size >= lookup<32>(book.edges, exponent));
  const vfloat guess = size * lookup<16>(book.slopes, region) + lookup<16>(book.offsets, region);
  vint code = truncated(guess);
  code -= size >= lookup<with_sign ? kCodes / 2 : kCodes>(book.bounds, code);
#else
  const vint bits = (vint)size;
  const vint bucket = (vint)lookup<1 << 12>((const float*)book.buckets, bits >> 16);
  vint code = (bucket >> kThresholdBits) - ((bits & 0xffff) >= (bucket & ((1 << kThresholdBits) - 1)));
#endif
  if constexpr (with_sign) {
    const vint sign = (vint)value >> 31;  // -1 or 0
    code = ((code ^ sign) - sign) + kZeroCode;
    code = code < 0 ? vint{} : code;
  }
  return to_bytes((vuint)code);
}

}  // namespace
