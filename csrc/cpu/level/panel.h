// Weights in the units of a tile.
#pragma once

#include "codec.h"
#include "tile.h"

namespace {

using namespace entrenar;

// Parts of a weight, decoded and rounded to the dtype.
template <bool kPairs>
struct Decoded;

template <>
struct Decoded<false> {
  // Columns [q, q + count) of a row of the weight.
  static void load_row(const Weight& w, Dtype dtype, int64_t row, int64_t q, int64_t count, uint32_t* out) {
    float* to = (float*)out;
    if (w.codes) {
      for (int64_t i = 0; i < count; i += int4::kGroup) decode_group(w, row, q + i, dtype, to + i);
      return;
    }
    const float* from = w.dense + row * w.columns + q;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const vfloat value = load<vfloat>(from + i);
      store(to + i, dtype == kBFloat16 ? round_to_bfloat16(value) : value);
    }
    for (; i < count; i++) to[i] = dtype == kBFloat16 ? round_to_bfloat16(broadcast(from[i]))[0] : from[i];
  }

  // Columns [c, c + count) of one unit of rows, starting at row q.
  static void load_unit(const Weight& w, Dtype dtype, int64_t q, int64_t c, int64_t count, uint32_t* out) {
    load_row(w, dtype, q, c, count, out);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Decoded<true> {
  static void load_row(const Weight& w, Dtype, int64_t row, int64_t q, int64_t count, uint32_t* out) {
    uint16_t* to = (uint16_t*)out;
    if (w.codes) return decode_row(w, row, q, count, to);
    const float* from = w.dense + row * w.columns + q;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, to_halfwords(bfloat16_bits(load<vfloat>(from + i))));
    for (; i < count; i++) to[i] = bfloat16_of(from[i]);
    if (count % 2) to[count] = 0;
  }

  static void load_unit(const Weight& w, Dtype, int64_t q, int64_t c, int64_t count, uint32_t* out) {
    const bool second = q + 1 < w.rows;
    if (w.codes) return decode_rows(w, q, c, count, out);
    const float* from = w.dense + q * w.columns + c;
    const float* next = from + w.columns;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const vuint high = second ? bfloat16_bits(load<vfloat>(next + i)) << 16 : vuint{};
      store(out + i, bfloat16_bits(load<vfloat>(from + i)) | high);
    }
    for (; i < count; i++) out[i] = bfloat16_of(from[i]) | (second ? (uint32_t)bfloat16_of(next[i]) << 16 : 0);
  }

  static uint16_t bfloat16_of(float value) { return bfloat16_bits(broadcast(value))[0]; }
};
#endif

}  // namespace
