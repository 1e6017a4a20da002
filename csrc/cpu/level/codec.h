// int4 to float32 and bfloat16, and what encoding needs too.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

// Elements [column, column + 32) of a row as float32, zeros past its end.
inline void load_group(const void* weight, Dtype dtype, int64_t row, int64_t columns, int64_t column, float* group) {
  const int64_t index = row * columns + column;
  const float* floats = (const float*)weight + index;
  const uint16_t* halfwords = (const uint16_t*)weight + index;
  if (columns - column >= int4::kGroup) {
    for (int i = 0; i < int4::kGroup; i += kLanes) {
      store(group + i, dtype == kFloat32 ? load<vfloat>(floats + i) : load_bfloat16(halfwords + i));
    }
    return;
  }
  for (int64_t i = 0; i < int4::kGroup; i++) {
    group[i] = column + i >= columns ? 0 : dtype == kFloat32 ? floats[i] : int4::bfloat16_to_float(halfwords[i]);
  }
}

// Adding 1.5 * 2^23 rounds half to even in the last bits of the sum.
constexpr float kMagic = 12582912.0f;

inline float scale_of(const Weight& w, int64_t row, int64_t column) {
  const int shift = w.block == 64 ? 6 : 5;  // a division would take longer than all the rest of a group
  const int64_t index = row * ((w.columns + w.block - 1) >> shift) + (column >> shift);
  return w.float32_scales ? ((const float*)w.scales)[index] : half_to_float(((const uint16_t*)w.scales)[index]);
}

inline const uint8_t* group_of(const Weight& w, int64_t row, int64_t column) {
  return w.codes + row * int4::row_bytes(w.columns) + column / int4::kGroup * int4::kGroupBytes;
}

// The codes q of `kLanes` bytes at `codes`: of their low nibbles, and of their high ones.
inline void decode_codes(const uint8_t* codes, vfloat& low, vfloat& high) {
  const vint bytes = (vint)widen(load<vbyte>(codes));
  low = __builtin_convertvector((bytes & 15) - int4::kZeroNibble, vfloat);
  high = __builtin_convertvector((bytes >> 4) - int4::kZeroNibble, vfloat);
}

// Decodes the group that starts at `column`, a multiple of 32, to 32 values in float32, rounded to dtype.
inline void decode_group(const Weight& w, int64_t row, int64_t column, Dtype dtype, float* out) {
  const uint8_t* codes = group_of(w, row, column);
  const float s = scale_of(w, row, column);
  for (int j = 0; j < int4::kGroupBytes; j += kLanes) {
    vfloat low, high;
    decode_codes(codes + j, low, high);
    low *= s, high *= s;
    store(out + j, dtype == kBFloat16 ? round_to_bfloat16(low) : low);
    store(out + int4::kGroupBytes + j, dtype == kBFloat16 ? round_to_bfloat16(high) : high);
  }
}

// The same to bfloat16.
inline void decode_group(const Weight& w, int64_t row, int64_t column, uint16_t* out) {
  const uint8_t* codes = group_of(w, row, column);
  const float s = scale_of(w, row, column);
#if defined(__AVX512BF16__)
  // The 16 values of the block are a table, of which a code's nibble is the index; its other bits are not looked at.
  const vfloat values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  const __m256i table = (__m256i)to_halfwords(bfloat16_bits(values * s));
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
  store(out, _mm256_permutexvar_epi16(words, table));
  store(out + int4::kGroupBytes, _mm256_permutexvar_epi16(_mm256_srli_epi16(words, 4), table));
#else
  for (int j = 0; j < int4::kGroupBytes; j += kLanes) {
    vfloat low, high;
    decode_codes(codes + j, low, high);
    store(out + j, to_halfwords(bfloat16_bits(low * s)));
    store(out + int4::kGroupBytes + j, to_halfwords(bfloat16_bits(high * s)));
  }
#endif
}

#if defined(__AVX512BF16__)
// For products of bfloat16, whose instructions take subnormal values for zeros, as these do.

// The 16 values of a block with this scale, of which a code's nibble is the index.
inline __m256i block_values(float s) {
  const vfloat codes = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)_mm512_cvtneps_pbh((__m512)(codes * s));
}

// The groups of columns [column, column + count) of a row; column is a multiple of 64.
inline void decode_row(const Weight& w, int64_t row, int64_t column, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; w.block == 2 * int4::kGroup && i + int4::kGroup < count; i += w.block) {
    const __m512i values = _mm512_broadcast_i64x4(block_values(scale_of(w, row, column + i)));
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)group_of(w, row, column + i)));
    const __m512i low = _mm512_permutexvar_epi16(words, values);
    const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), values);
    store(out + i, _mm512_castsi512_si256(low));
    store(out + i + 16, _mm512_castsi512_si256(high));
    store(out + i + 32, _mm512_extracti64x4_epi64(low, 1));
    store(out + i + 48, _mm512_extracti64x4_epi64(high, 1));
  }
  for (; i < count; i += int4::kGroup) decode_group(w, row, column + i, out + i);
}

// The same of two rows at once, as pairs with the first row's element in the low half; past the last row are zeros.
inline void decode_rows(const Weight& w, int64_t row, int64_t column, int64_t count, uint32_t* out) {
  const bool second = row + 1 < w.rows;
  vuint low = {}, high = {};
  for (int64_t i = 0; i < count; i += int4::kGroup) {
    if (i % w.block == 0) {
      low = widen((vhalfword)block_values(scale_of(w, row, column + i)));
      if (second) high = widen((vhalfword)block_values(scale_of(w, row + 1, column + i))) << 16;
    }
    const vuint a = widen(load<vbyte>(group_of(w, row, column + i)));
    const vuint b = second ? widen(load<vbyte>(group_of(w, row + 1, column + i))) : vuint{};
    const auto look_up = [](vuint table, vuint index) {
      return (vuint)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
    };
    store(out + i, look_up(low, a) | look_up(high, b));
    store(out + i + kLanes, look_up(low, a >> 4) | look_up(high, b >> 4));
  }
}
#endif

template <class T>
inline void copy_tail(T* out, const T* group, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = group[i];
}

void dequantize(const Weight* weight, int64_t row_begin, int64_t row_end, Dtype dtype, void* out) {
  const Weight& w = *weight;
  const int64_t whole = w.columns / int4::kGroup * int4::kGroup;
  for (int64_t row = row_begin; row < row_end; row++) {
    if (dtype == kFloat32) {
      float* to = (float*)out + row * w.columns;
      float group[int4::kGroup];
      for (int64_t c = 0; c < whole; c += int4::kGroup) decode_group(w, row, c, kFloat32, to + c);
      if (whole < w.columns) {
        decode_group(w, row, whole, kFloat32, group);
        copy_tail(to + whole, group, w.columns - whole);
      }
    } else {
      uint16_t* to = (uint16_t*)out + row * w.columns;
      uint16_t group[int4::kGroup];
      for (int64_t c = 0; c < whole; c += int4::kGroup) decode_group(w, row, c, to + c);
      if (whole < w.columns) {
        decode_group(w, row, whole, group);
        copy_tail(to + whole, group, w.columns - whole);
      }
    }
  }
}

}  // namespace
