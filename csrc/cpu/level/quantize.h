// float32 and bfloat16 to int4.
#pragma once

#include "codec.h"
#include "elements.h"

namespace {

// Values in units of the scale s, rounded to codes from `least` on, plus kMagic.
inline vfloat codes_of(vfloat values, float s, int least) {
  vfloat q = values / s;
  q = q > (float)int4::kMaxCode ? broadcast(int4::kMaxCode) : q;
  q = q < (float)least ? broadcast(least) : q;
  return q + kMagic;
}

inline void encode_group(const float* group, float s, int least, uint8_t* codes) {
  for (int j = 0; j < int4::kGroupBytes; j += kLanes) {
    vuint nibbles[2];
    for (int half = 0; half < 2; half++) {
      const vfloat q = codes_of(load<vfloat>(group + half * int4::kGroupBytes + j), s, least);
      nibbles[half] = (bits_of(q) + int4::kZeroNibble) & 15;
    }
    store(codes + j, to_bytes(nibbles[0] | nibbles[1] << 4));
  }
}

// The codes of whole groups whose quotients by the scale are below kMaxCode + 1/2, by the scale's inverse. Such a product
// is off from the quotient by at most 3 units of 2^-24 of itself. Returns whether that makes no difference to any code:
// not where a product is as near as 2^-18 to the middle of two.
inline bool encode_groups(const float* values, int64_t groups, float inverse, uint8_t* codes) {
  constexpr float kSure = 0.5f - 0x1p-18f;
  vuint apart = {};  // the largest distance to a code, as the bits of its magnitude
  for (int64_t g = 0; g < groups; g++, values += int4::kGroup, codes += int4::kGroupBytes) {
    for (int j = 0; j < int4::kGroupBytes; j += kLanes) {
      vuint nibbles[2];
      for (int half = 0; half < 2; half++) {
        const vfloat quotient = load<vfloat>(values + half * int4::kGroupBytes + j) * inverse;
        const vfloat q = quotient + kMagic;
        const vuint distance = bits_of(quotient - (q - kMagic)) & 0x7fffffff;
        apart = distance > apart ? distance : apart;
        nibbles[half] = (bits_of(q) + int4::kZeroNibble) & 15;
      }
      store(codes + j, to_bytes(nibbles[0] | nibbles[1] << 4));
    }
  }
  return !any_above((vfloat)apart, kSure);
}

// A scale as its dtype holds it.
inline float stored_scale(float s, bool float32_scales) {
  return float32_scales ? s : half_to_float(float_to_half(s));
}

inline bool is_usable(float s) {
  const float magnitude = __builtin_fabsf(s);
  return magnitude > 0 && magnitude <= 3.402823466e38f;
}

// The sum of the squared errors of `count` values, a multiple of 32, in the order that int4.h lays down.
inline float squared_error(const float* values, int64_t count, float s, int least) {
  constexpr int kVectors = int4::kErrorLanes / kLanes;
  vfloat sums[kVectors] = {};
  for (int64_t i = 0; i < count; i += int4::kErrorLanes) {
    for (int v = 0; v < kVectors; v++) {
      const vfloat x = load<vfloat>(values + i + v * kLanes);
      const vfloat error = rounded((codes_of(x, s, least) - kMagic) * s) - x;
      sums[v] += rounded(error * error);
    }
  }
  float lanes[int4::kErrorLanes];
  for (int v = 0; v < kVectors; v++) store(lanes + v * kLanes, sums[v]);
  for (int half = int4::kErrorLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The least code, and the scale of least squared error, of `count` values; `s` comes as that of the largest magnitude.
inline int fit_scale(const float* values, int64_t count, uint32_t absmax, bool float32_scales, float& s) {
  const float* v = values;
  while ((int4::float_bits(*v) & 0x7fffffff) != absmax) v++;
  int least = -int4::kMaxCode;
  float error = squared_error(values, count, s, least);
  for (int i = 0; i < int4::kDivisorCount; i++) {
    const float candidate = stored_scale(-*v / int4::divisor(i), float32_scales);
    if (!is_usable(candidate)) continue;
    const float its_error = squared_error(values, count, candidate, int4::kMinCode);
    if (its_error < error) error = its_error, s = candidate, least = int4::kMinCode;
  }
  return least;
}

// Blocks of a row, which share a scale each. What is done with one waits for the step before, so each step is taken for
// all of them.
template <Dtype dtype, int kBlock>
class Blocks {
 public:
  static constexpr int64_t kAtOnce = 16;

  Blocks(bool float32_scales, bool mse) : float32_scales_(float32_scales), mse_(mse) {}

  // `count` blocks of the `elements` elements that are left of a row.
  void take(const Element<dtype>* from, int64_t elements, int64_t count, uint8_t* codes, void* scales) {
    for (int64_t i = 0; i < count; i++) absmax_[i] = load(from + i * kBlock, elements - i * kBlock, values_[i]);
    find_scales();
    const int64_t whole = elements / kBlock < count ? elements / kBlock : count, quick = mse_ ? 0 : whole;
    bool sure[kAtOnce];
    for (int64_t i = 0; i < quick; i++) {  // while the next blocks come from memory
      prefetch_ahead(from + i * kBlock, kBlock * sizeof *from, kAtOnce * kBlock * sizeof *from);
      sure[i] = encode_groups(values_[i], kGroups, inverses_[i], codes + i * kBytes) & (inverses_[i] != 0);
    }
    for (int64_t i = 0; i < count; i++) {
      if (i >= quick || !sure[i]) {
        encode(i, i < whole ? kGroups : int4::groups(elements - i * kBlock), codes + i * kBytes);
      }
    }
    if (float32_scales_) {
      __builtin_memcpy(scales, scales_, count * sizeof *scales_);
    } else {
      __builtin_memcpy(scales, halfs_, count * sizeof *halfs_);
    }
  }

 private:
  static constexpr int kGroups = kBlock / int4::kGroup, kBytes = kGroups * int4::kGroupBytes;

  // The values of a block, zeros past the elements that are left, and their largest magnitude: as integers, magnitudes
  // order like floats, with infinity and NaN above them all.
  static uint32_t load(const Element<dtype>* from, int64_t left, float* values) {
    vuint most = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      vfloat value = {};
      if (left - i >= kLanes) {
        value = load_vector<dtype>(from + i);
      } else if (left > i) {
        value = load_some<dtype>(from + i, left - i);
      }
      store(values + i, value);
      const vuint magnitude = bits_of(value) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    return largest(most);
  }

  // Those of the largest magnitudes, and what values are multiplied by instead of a division: 0 where that may not do.
  void find_scales() {
    for (int i = 0; i < kAtOnce; i += kLanes) {
      const vfloat absmax = ::load<vfloat>(absmax_ + i);
      vfloat scale = absmax / (float)int4::kMaxCode;
      store_float16(halfs_ + i, scale);
      if (!float32_scales_) scale = load_float16(halfs_ + i);
      const vfloat inverse = 1.0f / scale;
      store(scales_ + i, scale);
      store(inverses_ + i, absmax * inverse < int4::kMaxCode + 0.49f ? inverse : vfloat{});
    }
  }

  // The codes of so many groups by division; with `mse` after finding the scale.
  void encode(int64_t i, int64_t groups, uint8_t* codes) {
    if (!is_usable(scales_[i])) {
      __builtin_memset(codes, int4::kZeroByte, groups * int4::kGroupBytes);
      return;
    }
    int least = -int4::kMaxCode;
    if (mse_) {
      least = fit_scale(values_[i], groups * int4::kGroup, absmax_[i], float32_scales_, scales_[i]);
      halfs_[i] = float_to_half(scales_[i]);
    }
    for (int64_t g = 0; g < groups; g++) {
      encode_group(values_[i] + g * int4::kGroup, scales_[i], least, codes + g * int4::kGroupBytes);
    }
  }

  const bool float32_scales_, mse_;
  alignas(64) float values_[kAtOnce][kBlock];
  alignas(64) uint32_t absmax_[kAtOnce] = {};
  alignas(64) float scales_[kAtOnce], inverses_[kAtOnce];
  uint16_t halfs_[kAtOnce];
};

template <Dtype dtype, int kBlock>
void quantize_rows(const void* weight, int64_t rows, int64_t columns, bool float32_scales, bool mse, uint8_t* codes,
                   void* scales) {
  Blocks<dtype, kBlock> blocks(float32_scales, mse);
  const int64_t in_row = (columns + kBlock - 1) / kBlock, code_bytes = int4::row_bytes(columns);
  const int64_t scale_bytes = float32_scales ? sizeof(float) : sizeof(uint16_t);
  for (int64_t row = 0; row < rows; row++) {
    const auto* from = (const Element<dtype>*)weight + row * columns;
    for (int64_t first = 0; first < in_row; first += blocks.kAtOnce) {
      const int64_t count = in_row - first < blocks.kAtOnce ? in_row - first : blocks.kAtOnce;
      blocks.take(from + first * kBlock, columns - first * kBlock, count, codes + row * code_bytes + first * kBlock / 2,
                  (char*)scales + (row * in_row + first) * scale_bytes);
    }
  }
}

void quantize(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales, bool mse,
              uint8_t* codes, void* scales) {
  const auto of_kind = block == 64 ? (dtype == kFloat32 ? quantize_rows<kFloat32, 64> : quantize_rows<kBFloat16, 64>)
                                   : (dtype == kFloat32 ? quantize_rows<kFloat32, 32> : quantize_rows<kBFloat16, 32>);
  of_kind(weight, rows, columns, float32_scales, mse, codes, scales);
}

}  // namespace
