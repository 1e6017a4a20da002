// Vectors of 8-bit codes to float32 and back.
#pragma once

#include "../../codes8bit.h"
#include "byte_table.h"
#include "elements.h"
#include "lookup.h"
#include "math.h"

namespace {

inline vfloat magnitude(vfloat value) { return (vfloat)(bits_of(value) & 0x7fffffff); }

// To the codes of a codebook, with signs or without, and back: `kCodeVectors` vectors at once.
#if defined(__AVX512VBMI__)

constexpr int kCodeVectors = 4;

template <bool with_sign>
class Codec {
 public:
  explicit Codec(const Codebook& book) : book_(book), values_(book.values), bounds_(book.bounds) {}

  void decode(const uint8_t* codes, vfloat* values) const {
    values_.lookup<kCodes>(interleaved(_mm512_loadu_si512(codes)), values);
  }

  // The codes of finite values between -1 and 1, or hardly beyond: the nearest value's, of two equally near the
  // smaller's.
  void encode(const vfloat* values, uint8_t* to) const {
    vfloat sizes[kCodeVectors], bounds[kCodeVectors];
    vint codes[kCodeVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) {
      sizes[v] = size_of(values[v]);
      codes[v] = guess(sizes[v]);
    }
    bounds_.lookup<with_sign ? kCodes / 2 : kCodes>(interleaved_bytes(codes), bounds);
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) {
      codes[v] = increased_where(sizes[v], bounds[v], codes[v]);
      if constexpr (with_sign) codes[v] = (vint)values[v] < 0 ? kZeroCode - codes[v] : kZeroCode + codes[v];
    }
    _mm512_storeu_si512(to, interleaved(interleaved_bytes(codes)));
  }

 private:
  static vfloat size_of(vfloat value) {
    constexpr int kLargerMagnitude = 0b1011;
    return (vfloat)_mm512_range_ps((__m512)value, _mm512_set1_ps(kLeastMagnitude), kLargerMagnitude);
  }

  // value + 1 where a >= b.
  static vint increased_where(vfloat a, vfloat b, vint value) {
    const __mmask16 where = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
    return (vint)_mm512_mask_add_epi32((__m512i)value, where, (__m512i)value, _mm512_set1_epi32(1));
  }

  // The code of a magnitude, counted from the zero, or the one before.
  vint guess(vfloat size) const {
    const vint exponent = (vint)size >> 23, first = (vint)lookup<32>((const float*)book_.regions, exponent);
    const vint region = increased_where(size, lookup<32>(book_.edges, exponent), first);
    const __m512 slope = (__m512)lookup<16>(book_.slopes, region), offset = (__m512)lookup<16>(book_.offsets, region);
    return (vint)_mm512_cvttps_epi32(_mm512_fmadd_ps((__m512)size, slope, offset));
  }

  const Codebook& book_;
  const ByteTable values_, bounds_;
};

#else

constexpr int kCodeVectors = 1;

template <bool with_sign>
class Codec {
 public:
  explicit Codec(const Codebook& book) : book_(book) {}

  void decode(const uint8_t* codes, vfloat* value) const {
    for (int i = 0; i < kLanes; i++) (*value)[i] = book_.values[codes[i]];
  }

  void encode(const vfloat* value, uint8_t* to) const {
    const vfloat size = larger(magnitude(*value), broadcast(kLeastMagnitude));
    const vint bits = (vint)size;
    const vint bucket = (vint)lookup<1 << 12>((const float*)book_.buckets, bits >> 16);
    vint code = (bucket >> kThresholdBits) - ((bits & 0xffff) >= (bucket & ((1 << kThresholdBits) - 1)));
    if constexpr (with_sign) {
      const vint sign = (vint)*value >> 31;  // -1 or 0
      code = ((code ^ sign) - sign) + kZeroCode;
      code = code < 0 ? vint{} : code;
    }
    store(to, to_bytes((vuint)code));
  }

 private:
  const Codebook& book_;
};

#endif

constexpr int kCodeLanes = kCodeVectors * kLanes;

}  // namespace
