// Products of rows in int8 with an int4 weight, in whole numbers within a block: of a block of a row, x = s q with
// s = absmax / 127. The weight's nibbles stay unsigned, u = code + 8, which the `correction` -8 Σ q makes good.
#pragma once

#include "codec.h"
#include "transpose.h"

namespace {

using namespace entrenar;

constexpr int kInt8Unit = 4;  // elements in a 32-bit word

void to_int8(const void* x, Dtype dtype, int64_t rows, int64_t columns, int block, const Int8Rows* out) {
  for (int64_t m = 0; m < rows; m++) {
    int8_t* codes = out->codes + m * out->stride;
    for (int64_t b = 0; b < out->blocks; b++) {
      float group[2 * int4::kGroup];
      vuint largest = {};  // as integers, magnitudes order like floats with infinity and NaN above them all
      const int64_t begin = b * block, end = begin + block < out->stride ? begin + block : out->stride;
      for (int64_t c = begin; c < end; c += int4::kGroup) {
        load_group(x, dtype, m, columns, c, group + (c - begin));
        for (int i = 0; i < int4::kGroup; i += kLanes) {
          const vuint magnitude = load<vuint>(group + (c - begin) + i) & 0x7fffffff;
          largest = magnitude > largest ? magnitude : largest;
        }
      }
      uint32_t bits = 0;
      for (int i = 0; i < kLanes; i++) bits = largest[i] > bits ? largest[i] : bits;
      const float absmax = int4::bits_float(bits);
      const float inverse = absmax >= 1e-30f ? 127.0f / absmax : 0.0f;  // less counts as zero, for its inverse overflows
      vint total = {};
      for (int64_t i = 0; i < end - begin; i += kLanes) {
        // Adding 1.5 * 2^23 rounds half to even in the last bits of the sum.
        const vfloat quotient = rounded(load<vfloat>(group + i) * inverse);
        const vint q = (vint)bits_of(quotient + 12582912.0f) - 0x4b400000;
        store(codes + begin + i, to_bytes((vuint)q & 0xff));
        total += q;
      }
      int32_t sum = 0;
      for (int i = 0; i < kLanes; i++) sum += total[i];
      out->scales[m * out->blocks + b] = absmax >= 1e-30f ? absmax / 127.0f : absmax * 0.0f;  // NaN stays NaN
      out->corrections[m * out->blocks + b] = -int4::kZeroNibble * sum;
    }
  }
}

// total + the products of four unsigned bytes and four signed ones.
inline vint multiply_add_bytes(vint total, vuint u, uint32_t q) {
#if defined(__AVX512VNNI__)
  const __m512i signed_bytes = _mm512_set1_epi32((int)q);
  __m512i sum = (__m512i)total;
  // Not the intrinsic, around which gcc 12 copies the sums.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"((__m512i)u), "v"(signed_bytes));
  return (vint)sum;
#elif defined(__AVX2__)
  // Of nibbles, which keep the sum of two products within 16 bits.
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, _mm256_set1_epi32((int)q));
  return total + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  for (int i = 0; i < kInt8Unit; i++) {
    total += (vint)(u >> 8 * i & 0xff) * (int32_t)(int8_t)(q >> 8 * i);
  }
  return total;
#endif
}

// The nibbles of `depth` columns of a row, each in a byte, in the columns' order.
inline void load_nibbles(const Weight& w, int64_t row, int64_t q, int64_t depth, uint32_t* out) {
  typedef uint8_t Bytes __attribute__((vector_size(int4::kGroupBytes)));
  uint8_t* to = (uint8_t*)out;
  const uint8_t* codes = group_of(w, row, q);
  for (int64_t i = 0; i < depth; i += int4::kGroup, codes += int4::kGroupBytes) {
    const Bytes pairs = load<Bytes>(codes);
    store(to + i, (Bytes)(pairs & 15));
    store(to + i + int4::kGroupBytes, (Bytes)(pairs >> 4));
  }
}

// What the microkernel reads of rows of x, from some block on.
struct Int8Tile {
  const int8_t* codes;
  const float* scales;
  const int32_t* corrections;
  int64_t stride, blocks;

  Int8Tile from_row(int64_t row) const {
    return {codes + row * stride, scales + row * blocks, corrections + row * blocks, stride, blocks};
  }
};

template <int kRows, int kVectors>
void micro_int8(const Int8Tile& x, const uint32_t* panel, const float* weight_scales, int64_t units, int64_t block_units,
                float* sums, bool first) {
  for (int64_t begin = 0, b = 0; begin < units; begin += block_units, b++) {
    const int64_t end = begin + block_units < units ? begin + block_units : units;
    vint total[kRows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) total[r][v] = vint{} + x.corrections[r * x.blocks + b];
    }
    for (int64_t u = begin; u < end; u++) {
      vuint columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) columns[v] = load<vuint>(panel + u * kTileColumns + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; r++) {
        const uint32_t value = load<uint32_t>(x.codes + r * x.stride + u * kInt8Unit);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) total[r][v] = multiply_add_bytes(total[r][v], columns[v], value);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const float scale = x.scales[r * x.blocks + b];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        float* sum = sums + r * kTileColumns + v * kLanes;
        const vfloat before = first && b == 0 ? vfloat{} : load<vfloat>(sum);
        const vfloat scales = scale * load<vfloat>(weight_scales + b * kTileColumns + v * kLanes);
        store(sum, before + __builtin_convertvector(total[r][v], vfloat) * scales);
      }
    }
  }
}

constexpr int kInt8Rows = kLanes == 16 ? 6 : 4;
constexpr int kInt8Vectors = kLanes == 16 ? 4 : 2;

template <int kVectors, int kRows = kInt8Rows>
inline void micro_int8_of(int64_t rows, const Int8Tile& x, const uint32_t* panel, const float* weight_scales,
                          int64_t units, int64_t block_units, float* sums, bool first) {
  if (rows == kRows) {
    micro_int8<kRows, kVectors>(x, panel, weight_scales, units, block_units, sums, first);
  } else if constexpr (kRows > 1) {
    micro_int8_of<kVectors, kRows - 1>(rows, x, panel, weight_scales, units, block_units, sums, first);
  }
}

// sums[row][column] (+)= x w over `depth` columns of the weight from q on, a whole number of blocks but at its end.
void multiply_int8(const Weight& w, const Int8Rows& x, int64_t row_begin, int64_t rows, int64_t q, int64_t depth,
                   int64_t column, int64_t columns, uint32_t* decoded, uint32_t* panel, float* weight_scales, float* sums,
                   bool first) {
  const int64_t units = int4::groups(depth) * int4::kGroup / kInt8Unit, block_units = w.block / kInt8Unit;
  for (int64_t n = 0; n < columns; n++) load_nibbles(w, column + n, q, depth, decoded + n * kTileUnits);
  transpose(decoded, kTileUnits, columns, units, panel, kTileColumns);
  for (int64_t n = 0; n < columns; n++) {
    for (int64_t c = 0; c < depth; c += w.block) {
      weight_scales[c / w.block * kTileColumns + n] = scale_of(w, column + n, q + c);
    }
  }
  const Int8Tile tile = {x.codes + q, x.scales + q / w.block, x.corrections + q / w.block, x.stride, x.blocks};
  for (int64_t r = 0; r < rows; r += kInt8Rows) {
    const Int8Tile part = tile.from_row(row_begin + r);
    const int64_t count = rows - r < kInt8Rows ? rows - r : kInt8Rows;
    for (int64_t c = 0; c < columns; c += kInt8Vectors * kLanes) {
      micro_int8_of<kInt8Vectors>(count, part, panel + c, weight_scales + c, units, block_units,
                                  sums + r * kTileColumns + c, first);
    }
  }
}

}  // namespace
