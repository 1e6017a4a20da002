// The int4 byte format: one definition for every device.
//
// A row is cut into groups of 32 elements that share 16 bytes (byte j: element j low, element j + 16 high, as in
// GGUF's Q4_0) and into blocks of 64 or 32 elements that share a scale s. A nibble holds q + 8, and stands for q * s.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define INT4_HD static inline __host__ __device__
#else
#define INT4_HD static inline  // internal linkage: each instruction set keeps its own copy
#endif

namespace entrenar::int4 {  // CUDA has a global type int4

constexpr int kGroup = 32;
constexpr int kGroupBytes = 16;
constexpr int kMaxCode = 7;
constexpr int kMinCode = -8;  // which scales of least squared error use; those of the largest magnitude stop at -7
constexpr int kZeroNibble = 8;
constexpr uint8_t kZeroByte = kZeroNibble | kZeroNibble << 4;

// Of least squared error is absmax / kMaxCode with codes from -kMaxCode on, or one of -v / kDivisors[i] with codes from
// kMinCode on, where v is the first element of the largest magnitude: the earliest of the best ones in this order. A
// scale of these is rounded as it is stored, and left out if that makes it zero. The errors are float32: the squares
// (q s - x)^2, each operation rounded, are added up by kErrorLanes lanes, element i by lane i % kErrorLanes, and then
// the upper half of the lanes to the lower one until one is left. So every device finds the same scale.
constexpr int kDivisorCount = 8;
INT4_HD float divisor(int index) {
  constexpr float kDivisors[kDivisorCount] = {7.25f, 7.75f, 8.0f, 8.25f, 8.5f, 8.75f, 9.0f, 9.25f};
  return kDivisors[index];
}
constexpr int kErrorLanes = 16;

static_assert(kGroupBytes * 2 == kGroup, "two codes a byte");
static_assert(kZeroNibble + kMaxCode <= 15 && kZeroNibble + kMinCode >= 0, "a code fits a nibble");

INT4_HD int64_t groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }
INT4_HD int64_t row_bytes(int64_t columns) { return groups(columns) * kGroupBytes; }
INT4_HD int64_t blocks(int64_t columns, int block) { return (columns + block - 1) / block; }

INT4_HD uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

INT4_HD float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

INT4_HD float bfloat16_to_float(uint16_t value) { return bits_float((uint32_t)value << 16); }

// Rounds half to even; for finite values.
INT4_HD uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INT4_HD float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
  return bits_float(sign | float_bits(magnitude));
}

// Rounds half to even; overflows to infinity.
INT4_HD uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (magnitude < 0x38800000) {                       // below 2^-14: adding 0.5 leaves a multiple of 2^-24
    return sign | (uint16_t)(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | (uint16_t)((rounded - 0x38000000) >> 13);
}

}  // namespace entrenar::int4
