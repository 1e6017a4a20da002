// The exponentials of a softmax, and how they become factors of a product: a unit is a float32, or a pair of bfloat16 that
// are neighbours in the contraction.
#pragma once

#include "math.h"
#include "tile.h"

namespace {

// The function for the units in which this dtype is multiplied.
#if defined(__AVX512BF16__)
#define FOR_UNITS_OF(dtype, call) (dtype == kBFloat16 ? call<true> : call<false>)
#else
#define FOR_UNITS_OF(dtype, call) (call<false>)
#endif

template <bool kPairs>
constexpr int kUnit = Tile<kPairs>::kUnit;  // elements

// How probabilities are computed, and how they become operands of the next products.
template <bool kPairs>
struct Probability;

template <>
struct Probability<false> {
  static constexpr float kPerNat = 1;  // what a factor of e adds to a score

  template <int kCount>
  static void of(vfloat (&scores)[kCount]) {
    for (int i = 0; i < kCount; i++) scores[i] = vexp_or_zero(scores[i]);
  }

  // Of the vectors of a row that make units, and of those in neighbouring rows, which lie kUnit apart.
  static void store_units(uint32_t* to, const vfloat* vectors) { store(to, vectors[0]); }
  static void store_row_units(uint32_t* to, const vfloat* rows) { store(to, rows[0]); }
};

#if defined(__AVX512BF16__)
// The order of 16-bit elements 0, 16, 1, 17, ...
inline __m512i interleaved() {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
}

template <>
struct Probability<true> {
  static constexpr float kPerNat = 0x1.715476p+0f;

  template <int kCount>
  static __attribute__((always_inline)) void of(vfloat (&scores)[kCount]) {
    vexp2_coarse(scores);
  }

  static __m512i rounded(vfloat first, vfloat second) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  }
  static void store_units(uint32_t* to, const vfloat* vectors) {
    _mm512_storeu_si512(to, rounded(vectors[0], vectors[1]));
  }
  static void store_row_units(uint32_t* to, const vfloat* rows) {
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleaved(), rounded(rows[0], rows[2])));
  }
};
#endif

}  // namespace
