// Where everything lies in product_sm90.cu: fragments of wgmma, tiles in shared memory, and the order of the tiles.
// "Features" are the columns of the product: the weight's rows, or its columns in the gradient.
#pragma once

#include "../int4.h"
#include "pairs.h"

namespace entrenar::sm90 {

constexpr int kStep = 64;                  // of the contraction, a stage of the pipeline
constexpr int kWarpgroupFeatures = 64;     // the m of wgmma
constexpr int kFeatures = 2 * kWarpgroupFeatures;
constexpr int kCodesBytes = kFeatures * kStep / 2;
constexpr int kSwizzleBytes = 16;          // swizzles move chunks of 16 bytes

// A lane of a warp holds, of the warp's 16 x 16 part of wgmma's a, rows lane / 4 and that + 8 (half 0 and 1), columns
// 2 * (lane % 4) + {0, 1, 8, 9}; of d the same rows, and columns 2 * (lane % 4) + {0, 1} of every 8.

// The feature of a warpgroup's 64 that such a row stands for. In the gradient a lane reads bytes of codes in pairs, which
// are neighbours among the features.
INT4_HD int feature_of(bool gradient, int warp, int lane, int half) {
  return 16 * warp + (gradient ? lane / 4 * 2 + half : 8 * half + lane / 4);
}

// Rows of 128 bytes that TMA wrote, or will read, with the 128-byte swizzle.
INT4_HD int swizzled_128(int row, int chunk) { return row * 128 + kSwizzleBytes * (chunk ^ (row & 7)); }

// Forward: the codes of a stage are 128 rows of 32 bytes, a group in each half, with the 32-byte swizzle. The bytes at
// 2 * t and 2 * t + 1 of a group hold in their low nibbles the values that lane t needs in the group's first 16, and
// in their high nibbles those of its second 16; 8 bytes on lie its other two values.
INT4_HD int forward_codes(int row, int group) { return row * 32 + kSwizzleBytes * (group ^ (row >> 2 & 1)); }

// Gradient: 64 rows of 64 bytes, a group in each chunk, with the 64-byte swizzle.
INT4_HD int gradient_codes(int row, int group) { return row * 64 + kSwizzleBytes * (group ^ (row >> 1 & 3)); }

// Scales are split in two bfloat16, high and low. Forward: for each group and row {high, high, low, low}.
// Gradient: for each group and pair of rows {high, high, low, low} of the two; the two pairs that a lane needs for a
// multiplication lie side by side.
INT4_HD int forward_scales(int group, int row) { return group * kFeatures * 8 + row * 8; }
INT4_HD int gradient_scales(int group, int row) {
  return group * kStep * 4 + row / 16 * 64 + row % 8 / 2 * 16 + row / 8 % 2 * 8 + row % 2 * 2;
}
constexpr int kScales = 2 * kStep;  // pairs of scales of a stage
constexpr int kScalesBytes = 2 * kFeatures * 8;
constexpr int kScalesLow = 4;

struct alignas(8) Scales {
  uint32_t high, low;
};

// A float16 scale is the sum of two bfloat16: its leading 8 bits, and the 3 that are left, low and high in a word.
INT4_HD uint32_t split_scale(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float s;
  asm("cvt.f32.f16 %0, %1;" : "=f"(s) : "h"(half));
#else
  const float s = int4::half_to_float(half);
#endif
  const uint32_t high = int4::float_bits(s) & 0xffff0000;
  // Zero takes the sign of s, that 0 * s may.
  const uint32_t low = int4::float_bits(s - int4::bits_float(high)) | (high & 0x80000000);
  return high >> 16 | (low & 0xffff0000);
}

// The low nibbles of a word's two halves times their scales: q * low is exact, so that the sum rounds once.
INT4_HD uint32_t decode_pair(uint32_t codes, uint32_t scale_high, uint32_t scale_low) {
  const uint32_t biased = masked_or(codes, 0x000f000f, 0x43004300);  // 128 + u
  const uint32_t q = subtract_pair(biased, 0x43084308);              // 128 + int4::kZeroNibble
  return fma_pair(q, scale_high, multiply_pair(q, scale_low));
}

// Bytes 0 and 1 of a word, each in a half of its own.
INT4_HD uint32_t spread_bytes(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4140);
#else
  return (word & 0xff) | (word & 0xff00) << 8;
#endif
}

// Four 8 x 8 matrices of two bytes an element, whose rows of 16 bytes lie where the lanes say, the first matrix's where
// the first eight do. A lane gets from each its column lane / 4, the rows 2 * (lane % 4) and, in the upper half, the next.
#if defined(__CUDA_ARCH__)
INT4_HD void load_matrices_transposed(uint32_t (&words)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"((uint32_t)__cvta_generic_to_shared(row))
               : "memory");
}
#endif

// Half of a stage, 32 of the contraction, as a thread of the consumers reads it for two multiplications: nothing waits
// for it before it is decoded.
template <bool gradient>
struct Encoded {
  uint32_t codes[4];                // of each multiplication and eight of the contraction; or of each half and eight
  Scales scales[gradient ? 4 : 2];  // likewise; or of each half
};

template <bool gradient>
INT4_HD void read(Encoded<gradient>& encoded, const char* codes, const char* scales, int thread, int group) {
  const int warpgroup = thread / 128, warp = thread % 128 / 32, lane = thread % 32, pair = 2 * (lane % 4);
  if constexpr (gradient) {
    const int features = 2 * warpgroup + warp / 2;  // in groups
#if defined(__CUDA_ARCH__)
    load_matrices_transposed(encoded.codes, codes + gradient_codes(32 * group + lane, features));
#else
    for (int i = 0; i < 4; i++) {
      encoded.codes[i] = 0;
      for (int j = 0; j < 2; j++) {
        const char* const row = codes + gradient_codes(32 * group + 8 * i + pair + j, features);
        encoded.codes[i] |= *(const uint16_t*)(row + lane / 4 * 2) << 16 * j;
      }
    }
#endif
    for (int k = 0; k < 2; k++) {
      struct alignas(16) Pair {
        Scales of_eight[2];
      };
      const auto both = *(const Pair*)(scales + gradient_scales(features, 16 * (2 * group + k) + pair));
      for (int i = 0; i < 2; i++) encoded.scales[2 * k + i] = both.of_eight[i];
    }
  } else {
    for (int half = 0; half < 2; half++) {
      const int row = kWarpgroupFeatures * warpgroup + feature_of(false, warp, lane, half);
      encoded.scales[half] = *(const Scales*)(scales + forward_scales(group, row));
      for (int i = 0; i < 2; i++) {
        encoded.codes[2 * half + i] = *(const uint16_t*)(codes + forward_codes(row, group) + pair + 8 * i);
      }
    }
  }
}

// wgmma's first operand for the two multiplications.
using Fragments = uint32_t[2][4];

template <bool gradient>
INT4_HD void decode(Fragments& a, const Encoded<gradient>& encoded, int thread) {
  for (int j = 0; j < 4; j++) {
    const Scales scale = encoded.scales[gradient ? j : j / 2];
    if (gradient) {
      const uint32_t codes = encoded.codes[j] >> thread / 32 % 2 * 4;  // a warp has one half of a group's features
      for (int half = 0; half < 2; half++) {
        a[j / 2][2 * (j % 2) + half] = decode_pair(codes >> 8 * half, scale.high, scale.low);
      }
    } else {
      const uint32_t codes = spread_bytes(encoded.codes[j]);
      for (int k = 0; k < 2; k++) a[k][2 * (j % 2) + j / 2] = decode_pair(codes >> 4 * k, scale.high, scale.low);
    }
  }
}

// A pair of scales, in memory those of two groups of a row.
template <bool gradient>
INT4_HD void write_scales(char* scales, int index, uint32_t pair) {
  for (int i = 0; i < 2; i++) {
    const uint32_t split = split_scale(pair >> 16 * i);
    if (gradient) {
      uint16_t* const to = (uint16_t*)(scales + gradient_scales(2 * (index / kStep) + i, index % kStep));
      to[0] = split;
      to[kScalesLow / 2] = split >> 16;
    } else {
      *(Scales*)(scales + forward_scales(i, index)) = {(split & 0xffff) * 0x10001, (split >> 16) * 0x10001};
    }
  }
}

// The output's tile, rows of 64 features. Forward: the row of 8 of them that a lane addresses for stmatrix, which takes
// the features of both halves by 16 tokens. Gradient: where a lane's two features of the first or second of its tokens
// go; the next 8 tokens lie as far on as 8 rows.
INT4_HD int forward_stored(int warp, int lane) {
  return swizzled_128(8 * (lane / 16) + lane % 8, 2 * warp + lane / 8 % 2);
}
INT4_HD int gradient_stored(int warp, int lane, int token) {
  return swizzled_128(2 * (lane % 4) + token, 2 * warp + lane / 16) + lane / 4 % 4 * 4;
}
constexpr int kNextTokens = 8 * 128;

// The order of the tiles: runs of kRun token tiles by all features, so that blocks which work at one time share both.

constexpr int kRun = 4;

struct Tile {
  int features, tokens;
};

INT4_HD Tile tile_at(int64_t index, int feature_tiles, int token_tiles) {
  const int64_t run = index / ((int64_t)kRun * feature_tiles), first = run * kRun;
  const int width = token_tiles - first < kRun ? (int)(token_tiles - first) : kRun;
  const int64_t within = index - first * feature_tiles;
  return {(int)(within / width), (int)(first + within % width)};
}

}  // namespace entrenar::sm90
