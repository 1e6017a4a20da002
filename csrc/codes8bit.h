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

// The values are those of Dettmers' dynamic map: decades, each cut into equal cells, so that a magnitude's decade and a
// multiplication give its code or the one before, and one comparison tells which. A decade, or what lies above the last
// cell or below the first, is a region. An exponent meets at most two regions.
struct Codebook {
  float values[kCodes];
  float bounds[kCodes];   // magnitudes from bounds[i] on have a code above i, which counts from the zero
  float edges[32];        // by the exponent's last 5 bits: from which magnitude on it lies in the second region
  int32_t regions[32];    // the first
  float slopes[16], offsets[16];  // of the guess, by region

  // The same in one step, for processors that look up a word in memory faster than they do the above. By the exponent's
  // last 5 bits and the fraction's first 7: the code at the bottom of such a bucket, shifted, and from where in the other
  // 16 bits on it is one more.
  uint32_t buckets[1 << 12];
};

constexpr int kThresholdBits = 17;
constexpr int kCodebookWords = sizeof(Codebook) / sizeof(uint32_t);

static_assert(kCodebookWords == 2 * kCodes + 2 * 32 + 2 * 16 + (1 << 12), "an array of 32-bit words");

INT4_HD int64_t code_blocks(int64_t size) { return (size + kCodeBlock - 1) / kCodeBlock; }

}  // namespace entrenar
