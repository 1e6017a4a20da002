// Products with few rows of x, straight from the codes: memory-bound, so nothing is decoded to memory.
#pragma once

#include "codec.h"

namespace {

using namespace entrenar;

constexpr int kPrefetchBytes = 3008;  // ahead of the codes in use; a power of two would alias in the cache

template <int kRows>
inline void dot_int4(const Weight& w, int64_t row, const Units& x, vfloat* total) {
  const uint8_t* codes = group_of(w, row, 0);
  const int64_t columns = int4::groups(w.columns) * int4::kGroup;
  for (int64_t begin = 0; begin < columns; begin += w.block) {
    const int64_t end = begin + w.block < columns ? begin + w.block : columns;
    vfloat block[kRows] = {};
    for (int64_t c = begin; c < end; c += int4::kGroup, codes += int4::kGroupBytes) {
      __builtin_prefetch(codes + kPrefetchBytes);
#pragma GCC unroll 4
      for (int j = 0; j < int4::kGroupBytes; j += kLanes) {
        vfloat low, high;
        decode_codes(codes + j, low, high);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; m++) {
          const uint32_t* xs = x.data + m * x.stride + c + j;
          block[m] += low * load<vfloat>(xs) + high * load<vfloat>(xs + int4::kGroupBytes);
        }
      }
    }
    const float s = scale_of(w, row, begin);
    for (int m = 0; m < kRows; m++) total[m] += s * block[m];
  }
}

template <int kRows>
inline void dot_dense(const Weight& w, int64_t row, const Units& x, vfloat* total) {
  const float* values = w.dense + row * w.columns;
  int64_t c = 0;
  for (; c + kLanes <= w.columns; c += kLanes) {
    for (int m = 0; m < kRows; m++) total[m] += load<vfloat>(values + c) * load<vfloat>(x.data + m * x.stride + c);
  }
  for (; c < w.columns; c++) {
    for (int m = 0; m < kRows; m++) total[m][0] += values[c] * load<float>(x.data + m * x.stride + c);
  }
}

template <int kRows>
void dot_rows(const Product& p, int64_t column_begin, int64_t column_end) {
  for (int64_t n = column_begin; n < column_end; n++) {
    vfloat total[kRows] = {};
    for (int t = 0; t < p.terms; t++) {
      (p.w[t].codes ? dot_int4<kRows> : dot_dense<kRows>)(p.w[t], n, p.x[t], total);
    }
    for (int m = 0; m < kRows; m++) {
      const float value = p.scale * sum(total[m]) + (p.bias ? p.bias[n] : 0.0f);
      if (p.dtype == kFloat32) {
        ((float*)p.y)[m * p.columns + n] = value;
      } else {
        uint16_t rounded[kLanes];
        store_bfloat16(rounded, broadcast(value));
        ((uint16_t*)p.y)[m * p.columns + n] = rounded[0];
      }
    }
  }
}

void dot(const Product* p, int64_t column_begin, int64_t column_end) {
  static_assert(kMaxDotRows == 4, "one case for each number of rows");
  switch (p->rows) {
    case 1: return dot_rows<1>(*p, column_begin, column_end);
    case 2: return dot_rows<2>(*p, column_begin, column_end);
    case 3: return dot_rows<3>(*p, column_begin, column_end);
    case 4: return dot_rows<4>(*p, column_begin, column_end);
  }
}

}  // namespace
