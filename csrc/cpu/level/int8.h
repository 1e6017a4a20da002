// Products of rows in int8 with an int4 weight, in whole numbers within a block: of a block of a row, x = s q with
// s = absmax / 127. Instructions take one factor unsigned: x is held as q + 128, which -128 Σ w makes good.
#pragma once

#include "codec.h"
#include "tile.h"
#include "transpose.h"

namespace {

using namespace entrenar;

constexpr int kInt8Unit = 4;  // elements in a 32-bit word
constexpr int kInt8Zero = 128;

void to_int8(const void* x, Dtype dtype, int64_t rows, int64_t columns, int block, const Int8Rows* out) {
  for (int64_t m = 0; m < rows; m++) {
    uint8_t* codes = out->codes + m * out->stride;
    for (int64_t b = 0; b < out->blocks; b++) {
      float group[2 * int4::kGroup];
      vuint most = {};  // as integers, magnitudes order like floats with infinity and NaN above them all
      const int64_t begin = b * block, end = begin + block < out->stride ? begin + block : out->stride;
      for (int64_t c = begin; c < end; c += int4::kGroup) {
        load_group(x, dtype, m, columns, c, group + (c - begin));
        for (int i = 0; i < int4::kGroup; i += kLanes) {
          const vuint magnitude = load<vuint>(group + (c - begin) + i) & 0x7fffffff;
          most = magnitude > most ? magnitude : most;
        }
      }
      const float absmax = int4::bits_float(largest(most));
      const float inverse = absmax >= 1e-30f ? 127.0f / absmax : 0.0f;  // less counts as zero, for its inverse overflows
      for (int64_t i = 0; i < end - begin; i += kLanes) {
        // The last bits of the sum with kMagic are the number rounded half to even, of which a byte is kept.
        const vfloat quotient = rounded(load<vfloat>(group + i) * inverse) + kMagic;
        store(codes + begin + i, to_bytes((bits_of(quotient) + kInt8Zero) & 0xff));
      }
      out->scales[m * out->blocks + b] = absmax >= 1e-30f ? absmax / 127.0f : absmax * 0.0f;  // NaN stays NaN
    }
  }
}

// total + the products of four unsigned bytes of x and four signed ones of w.
inline vint multiply_add_bytes(vint total, uint32_t x, vuint w) {
#if defined(__AVX512VNNI__)
  const __m512i unsigned_bytes = _mm512_set1_epi32((int)x);
  __m512i sum = (__m512i)total;
  // Not the intrinsic, around which gcc 12 copies the sums.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"((__m512i)w));
  return (vint)sum;
#elif defined(__AVX2__)
  // Of nibbles, which keep the sum of two products within 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32((int)x), (__m256i)w);
  return total + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < kInt8Unit; i++) {
    const vint signed_bytes = (vint)(w << (24 - 8 * i)) >> 24;
    total += signed_bytes * (int32_t)(x >> 8 * i & 0xff);
  }
  return total;
#endif
}

// A part of a weight as a panel, for which there is room for `kUnits` units.
struct Int8Panel {
  static constexpr int64_t kUnits = 192, kBlocks = kUnits * kInt8Unit / int4::kGroup;

  alignas(64) uint32_t units[kUnits][kTileColumns];
  int32_t corrections[kBlocks][kTileColumns];
  float scales[kBlocks][kTileColumns];
  uint32_t codes[kSquare][kUnits];  // [column][unit], before they are transposed into units
  int64_t begin, depth;             // its columns of the weight
  int64_t block_units;

  int64_t count() const { return int4::groups(depth) * int4::kGroup / kInt8Unit; }
};

// The codes of `depth` columns of a row, each in a byte, in the columns' order.
inline void load_codes(const Weight& w, int64_t row, int64_t q, int64_t depth, uint32_t* out) {
  typedef int8_t Bytes __attribute__((vector_size(int4::kGroupBytes)));
  typedef uint8_t Pairs __attribute__((vector_size(int4::kGroupBytes)));
  int8_t* to = (int8_t*)out;
  const uint8_t* codes = group_of(w, row, q);
  for (int64_t i = 0; i < depth; i += int4::kGroup, codes += int4::kGroupBytes) {
    const Pairs pairs = load<Pairs>(codes);
    store(to + i, (Bytes)(pairs & 15) - int4::kZeroNibble);
    store(to + i + int4::kGroupBytes, (Bytes)(pairs >> 4) - int4::kZeroNibble);
  }
}

// The weight's columns [begin, begin + depth) of rows [row, row + rows).
void fill_int8(const Weight& w, int64_t begin, int64_t depth, int64_t row, int64_t rows, Int8Panel& panel) {
  panel.begin = begin, panel.depth = depth, panel.block_units = w.block / kInt8Unit;
  const int64_t units = panel.count();
  for (int64_t n = 0; n < rows; n += kSquare) {
    const int64_t count = rows - n < kSquare ? rows - n : kSquare;
    for (int64_t i = 0; i < count; i++) load_codes(w, row + n + i, begin, depth, panel.codes[i]);
    transpose(panel.codes[0], Int8Panel::kUnits, count, units, panel.units[0] + n, kTileColumns);
  }
  for (int64_t b = 0, u = 0; u < units; b++, u += panel.block_units) {
    for (int64_t n = 0; n < rows; n++) {
      panel.scales[b][n] = scale_of(w, row + n, begin + b * w.block);
    }
    for (int64_t c = 0; c < rows; c += kLanes) {
      vint total = {};
      for (int64_t i = u; i < u + panel.block_units && i < units; i++) {
        total = multiply_add_bytes(total, kInt8Zero * 0x01010101u, load<vuint>(panel.units[i] + c));
      }
      store(panel.corrections[b] + c, -total);
    }
  }
}

// sum += x panel for rows from `row` on and vectors from v on. Within a block the sums are whole numbers.
template <int kRows, int kVectors>
INLINE inline void add_int8(vfloat (&sum)[kRows][kVectors], const Int8Rows& x, const Int8Panel& panel, int64_t row,
                            int64_t v) {
  constexpr int64_t kLineUnits = 16;
  const int64_t units = panel.count();
  const uint8_t* codes = x.codes + row * x.stride + panel.begin;
  const float* scales = x.scales + row * x.blocks + panel.begin / kInt8Unit / panel.block_units;
  for (int64_t begin = 0, b = 0; begin < units; begin += panel.block_units, b++) {
    const int64_t end = begin + panel.block_units < units ? begin + panel.block_units : units;
    vint total[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      if (begin % kLineUnits == 0) __builtin_prefetch(codes + (kRows + r) * x.stride + begin * kInt8Unit, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) total[r][i] = load<vint>(panel.corrections[b] + (v + i) * kLanes);
    }
    for (int64_t u = begin; u < end; u++) {
      vuint columns[kVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) columns[i] = load<vuint>(panel.units[u] + (v + i) * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; r++) {
        const uint32_t value = load<uint32_t>(codes + r * x.stride + u * kInt8Unit);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) total[r][i] = multiply_add_bytes(total[r][i], value, columns[i]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; i++) {
        const vfloat scale = scales[r * x.blocks + b] * load<vfloat>(panel.scales[b] + (v + i) * kLanes);
        sum[r][i] += __builtin_convertvector(total[r][i], vfloat) * scale;
      }
    }
  }
}

}  // namespace
