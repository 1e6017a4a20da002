// Vectors of 8-bit codes to float32 and back.
#pragma once

#include "../../codes8bit.h"
#include "byte_table.h"
#include "elements.h"
#include "lookup.h"
#include "math.h"

namespace {

inline vfloat magnitude(vfloat value) { return (vfloat)(bits_of(value) & 0x7fffffff); }

// The codes of finite values between -1 and 1, or hardly beyond: the nearest value's, of two equally near the smaller's.
template <bool with_sign>
inline vbyte codes_by_buckets(const Codebook& book, vfloat value) {
  const vfloat size = larger(magnitude(value), broadcast(kLeastMagnitude));
  const vint bits = (vint)size;
  const vint bucket = (vint)lookup<1 << 12>((const float*)book.buckets, bits >> 16);
  vint code = (bucket >> kThresholdBits) - ((bits & 0xffff) >= (bucket & ((1 << kThresholdBits) - 1)));
  if constexpr (with_sign) {
    const vint sign = (vint)value >> 31;  // -1 or 0
    code = ((code ^ sign) - sign) + kZeroCode;
    code = code < 0 ? vint{} : code;
  }
  return to_bytes((vuint)code);
}

// To the codes of a codebook, with signs or without, and back: `kCodeVectors` vectors at once.
#if defined(__AVX512VBMI__)

constexpr int kCodeVectors = 4;

template <bool with_sign>
class Codec {
 public:
  explicit Codec(const Codebook& book) : book_(book), values_(book.values) {}

  void decode(const uint8_t* codes, vfloat* values) const {
    values_.lookup(interleaved(_mm512_loadu_si512(codes)), values);
  }

  // Vectors of values on their way to codes.
  struct Places {
    vint scaled[kCodeVectors], places[kCodeVectors];
  };

  // Of vector `v` of the values, times `scale`.
  void place(const float* values, float scale, int v, Places& to) const {
    const vfloat value = load<vfloat>(values + v * kLanes) * scale;
    to.scaled[v] = (vint)value;
    to.places[v] = place_of(size_of(value));
  }

  // The codes of values that all have their places.
  void encode(const float* values, float scale, const Places& from, uint8_t* to) const {
    __m512i fractions = _mm512_set1_epi32(-1);
#pragma GCC unroll 4
    for (int v = 0; v < kCodeVectors; v++) fractions = _mm512_min_epu16(fractions, (__m512i)from.places[v]);
    if (_mm512_cmplt_epu16_mask(fractions, _mm512_set1_epi32(kDoubt))) return encode_by_buckets(values, scale, to);
    __m512i codes = bytes<2>(from.places);
    if constexpr (with_sign) {
      const __m512i zero = _mm512_set1_epi8(kZeroCode);
      const __mmask64 negative = _mm512_movepi8_mask(bytes<3>(from.scaled));
      codes = _mm512_mask_subs_epu8(_mm512_add_epi8(zero, codes), negative, zero, codes);
    } else {
      codes = _mm512_sub_epi8(codes, _mm512_set1_epi8(1));
    }
    _mm512_storeu_si512(to, codes);
  }

 private:
  __attribute__((noinline)) void encode_by_buckets(const float* values, float scale, uint8_t* to) const {
    for (int i = 0; i < kCodeVectors * kLanes; i += kLanes) {
      store(to + i, codes_by_buckets<with_sign>(book_, load<vfloat>(values + i) * scale));
    }
  }

  static vfloat size_of(vfloat value) {
    constexpr int kLargerMagnitude = 0b1011;
    return (vfloat)_mm512_range_ps((__m512)value, _mm512_set1_ps(kLeastMagnitude), kLargerMagnitude);
  }

  // The code of a magnitude, in the third byte, and how far it is from the next smaller one, in the lower two.
  vint place_of(vfloat size) const {
    const vint bits = (vint)size;
    const vint region = (bits + (vint)lookup<32>((const float*)book_.regions, bits >> 23)) >> 23;
    const __m512 slope = (__m512)lookup<16>(book_.slopes, region), offset = (__m512)lookup<16>(book_.offsets, region);
    const vfloat line = (vfloat)_mm512_fmadd_ps((__m512)size, slope, offset);
    return (vint)smaller(line, lookup<16>(book_.limits, region));
  }

  const Codebook& book_;
  const ByteTable values_;
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

  using Places = vbyte;

  void place(const float* values, float scale, int, Places& to) const {
    to = codes_by_buckets<with_sign>(book_, load<vfloat>(values) * scale);
  }

  void encode(const float*, float, const Places& from, uint8_t* to) const { store(to, from); }

 private:
  const Codebook& book_;
};

#endif

constexpr int kCodeLanes = kCodeVectors * kLanes;

}  // namespace
