// States of optimizers in 8 bits: blocks of 256 elements share their largest magnitude, and an element is the code of the
// nearest of 256 values between -1 (or 0) and 1. Plain C types only.
#pragma once

#include <stdint.h>

#include "int4.h"

namespace entrenar {

constexpr int kCodes = 256;
constexpr int kCodeBlock = 256;
constexpr int kZeroCode = 127;                        // of signed codes, whose values mirror each other about it
constexpr float kLeastAbsmax = 1.17549435082e-38f;    // blocks below it are zeros: its inverse is the largest finite one
constexpr float kLeastMagnitude = 4.65661287308e-10f;  // 2^-31: every value that is not zero is larger

// The values are those of Dettmers' dynamic map: decades, each cut into equal cells.
struct Codebook {
  float values[kCodes];

  // For processors that look words up in registers. Magnitudes of a decade, or above the last cell or below the first,
  // are a region; in it the bits of min(slope * magnitude + offset, limit) hold the code in the third byte, counted from
  // the zero, or from one where there are no signs. What lies within kDoubt of the lower two bytes above a whole code may
  // have been rounded up to it.
  uint32_t regions[32];  // by the exponent's last 5 bits: what makes of a magnitude's bits the region, shifted by 23
  float slopes[16], offsets[16], limits[16];

  // For others. By the exponent's last 5 bits and the fraction's first 7: the code at the bottom of such a bucket, shifted,
  // and from where in the other 16 bits on it is one more.
  uint32_t buckets[1 << 12];
};

constexpr int kDoubt = 4;
constexpr int kThresholdBits = 17;
constexpr int kCodebookWords = sizeof(Codebook) / sizeof(uint32_t);

static_assert(kCodebookWords == kCodes + 32 + 3 * 16 + (1 << 12), "an array of 32-bit words");

INT4_HD int64_t code_blocks(int64_t size) { return (size + kCodeBlock - 1) / kCodeBlock; }

}  // namespace entrenar
