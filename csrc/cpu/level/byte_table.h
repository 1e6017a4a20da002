// A table of float32 that is looked up by its bytes: of 64 indices at once, in fewer instructions than by words.
#pragma once

#include "simd.h"

#if defined(__AVX512VBMI__)

namespace {

// Bytes of 4 vectors in the order that a lookup works in: the bytes of the first 4 elements of each vector, then of the
// next 4 of each, and so on.
inline __m512i interleaved(__m512i bytes) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

// The bytes at one place of the 32-bit words of 4 vectors, in their order.
template <int place>
inline __m512i bytes(const vint* words) {
  typedef uint8_t Bytes __attribute__((vector_size(64)));
  Bytes index;
  for (int i = 0; i < 64; i++) index[i] = i * 4 + place;
  const __m512i first = _mm512_permutex2var_epi8((__m512i)words[0], (__m512i)index, (__m512i)words[1]);
  const __m512i second = _mm512_permutex2var_epi8((__m512i)words[2], (__m512i)index, (__m512i)words[3]);
  return _mm512_inserti64x4(first, _mm512_castsi512_si256(second), 1);
}

class ByteTable {
 public:
  explicit ByteTable(const float* table) {
    for (int i = 0; i < kSize; i += kLanes) {
      const __m512i words = _mm512_loadu_si512(table + i);
      for (int place = 0; place < 4; place++) {
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srl_epi32(words, _mm_cvtsi32_si128(8 * place)));
        _mm_store_si128((__m128i*)places_[place] + i / kLanes, bytes);
      }
    }
  }

  // The elements at 64 interleaved indices.
  void lookup(__m512i index, vfloat* elements) const {
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i found[4];
#pragma GCC unroll 4
    for (int place = 0; place < 4; place++) {
      const __m512i* const table = places_[place];
      const __m512i low = _mm512_permutex2var_epi8(table[0], index, table[1]);
      const __m512i high = _mm512_permutex2var_epi8(table[2], index, table[3]);
      found[place] = _mm512_mask_blend_epi8(upper, low, high);
    }
    const __m512i a = _mm512_unpacklo_epi8(found[0], found[1]), b = _mm512_unpacklo_epi8(found[2], found[3]);
    const __m512i c = _mm512_unpackhi_epi8(found[0], found[1]), d = _mm512_unpackhi_epi8(found[2], found[3]);
    elements[0] = (vfloat)_mm512_unpacklo_epi16(a, b);
    elements[1] = (vfloat)_mm512_unpackhi_epi16(a, b);
    elements[2] = (vfloat)_mm512_unpacklo_epi16(c, d);
    elements[3] = (vfloat)_mm512_unpackhi_epi16(c, d);
  }

 private:
  static constexpr int kSize = 256;
  __m512i places_[4][kSize / 64];  // the lowest bytes of all elements, then the next ones
};

}  // namespace

#endif
