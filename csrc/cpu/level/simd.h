// Vectors of the level's width, in the compiler's own vector types: one source for every instruction set.
#pragma once

#include <stdint.h>

#include "../../int4.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE __attribute__((always_inline))

namespace {

namespace int4 = entrenar::int4;

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

// Fetches what lies some way behind `bytes` at `from` of a stream. A processor's own prefetching ends with each page of
// 4 KiB, and on some machines does not keep up at all.
inline void prefetch_ahead(const void* from, int64_t bytes, int64_t ahead = 2048) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch((const char*)from + ahead + i);
}

// Asks for what lies there, into the second-level cache.
INLINE inline void prefetch(const void* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch((const char*)from + i, 0, 2);
}

// Conversions between widths, which gcc's __builtin_convertvector takes apart into single elements.
#if defined(__AVX512F__)
inline vuint widen(vbyte value) { return (vuint)_mm512_cvtepu8_epi32((__m128i)value); }
inline vuint widen(vhalfword value) { return (vuint)_mm512_cvtepu16_epi32((__m256i)value); }
inline vhalfword to_halfwords(vuint value) { return (vhalfword)_mm512_cvtepi32_epi16((__m512i)value); }
inline vbyte to_bytes(vuint value) { return (vbyte)_mm512_cvtepi32_epi8((__m512i)value); }
#elif defined(__AVX2__)
inline vuint widen(vbyte value) {
  return (vuint)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)value));
}
inline vuint widen(vhalfword value) { return (vuint)_mm256_cvtepu16_epi32((__m128i)value); }
inline vhalfword to_halfwords(vuint value) {
  const __m256i packed = _mm256_packus_epi32((__m256i)value, (__m256i)value);
  return (vhalfword)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88));
}
inline vbyte to_bytes(vuint value) {
  const __m128i halfwords = (__m128i)to_halfwords(value);
  return (vbyte)_mm_cvtsi128_si64(_mm_packus_epi16(halfwords, halfwords));
}
#else
inline vuint widen(vbyte value) { return __builtin_convertvector(value, vuint); }
inline vuint widen(vhalfword value) { return __builtin_convertvector(value, vuint); }
inline vhalfword to_halfwords(vuint value) { return __builtin_convertvector(value, vhalfword); }
inline vbyte to_bytes(vuint value) { return __builtin_convertvector(value, vbyte); }
#endif

// A value that gcc leaves in its register, instead of loading it from memory again for each use.
inline vuint keep(vuint value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#endif
  return value;
}

// The value itself, which the compiler may not fuse with what follows into an operation that rounds once.
inline vfloat rounded(vfloat value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
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
  return (vfloat)(widen(load<vhalfword>(from)) << 16);
}

inline void store_bfloat16(uint16_t* to, vfloat value) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // which the instruction would make zeros
  if (!_mm512_fpclass_ps_mask((__m512)value, kSubnormal)) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    __builtin_memcpy(to, &rounded, sizeof(vhalfword));
    return;
  }
#endif
  const vuint bits = bits_of(value), rounded = bfloat16_bits(value);
  const vuint nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
  store(to, to_halfwords((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded));
}

#if defined(__AVX512BF16__)
// Two vectors, one after the other. A whole line goes past the caches, for it need not be fetched to be overwritten;
// _mm_sfence orders it before what follows.
inline void stream_bfloat16(uint16_t* to, vfloat first, vfloat second) {
  constexpr int kSubnormal = 0x20, kLine = 64;
  const __mmask16 subnormal =
      _mm512_fpclass_ps_mask((__m512)first, kSubnormal) | _mm512_fpclass_ps_mask((__m512)second, kSubnormal);
  if (subnormal || (uintptr_t)to % kLine) {
    store_bfloat16(to, first), store_bfloat16(to + kLanes, second);
  } else {
    _mm512_stream_si512((__m512i*)to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
}
#endif

inline float sum(vfloat value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);  // in pairs: one after the other takes longer than a short row
#else
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += value[i];
  return total;
#endif
}

inline bool any_above(vfloat value, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)value, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#else
  bool found = false;
  for (int i = 0; i < kLanes; i++) found |= value[i] > bound;
  return found;
#endif
}

#if defined(__AVX512F__)
inline float largest(vfloat value) { return _mm512_reduce_max_ps((__m512)value); }
inline uint32_t largest(vuint value) { return _mm512_reduce_max_epu32((__m512i)value); }
#else
template <class V>
inline auto largest(V value) {
  auto found = value[0];
  for (int i = 1; i < kLanes; i++) found = value[i] > found ? value[i] : found;
  return found;
}
#endif

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
