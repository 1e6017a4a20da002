// aᵀ b for a narrow a: the gradients of LoRA's matrices, summed over the rows of the batch in float32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

constexpr int kOuterRows = 8;     // rows of the result in registers
constexpr int kOuterVectors = kLanes == 16 ? 2 : 1;  // vectors of each
constexpr int kOuterColumns = kOuterVectors * kLanes;

template <Dtype dtype>
inline vfloat load_as_float(const void* b, int64_t index) {
  if (dtype == kFloat32) return load<vfloat>((const float*)b + index);
  return load_bfloat16((const uint16_t*)b + index);
}

template <Dtype dtype>
inline float element(const void* b, int64_t index) {
  if (dtype == kFloat32) return ((const float*)b)[index];
  return int4::bits_float((uint32_t)((const uint16_t*)b)[index] << 16);
}

template <Dtype dtype>
void outer_of(const float* a, int64_t rank, const void* b, int64_t rows, int64_t columns, int64_t column_begin,
              int64_t column_end, float* out) {
  for (int64_t i = 0; i < rank; i += kOuterRows) {
    const int64_t count = rank - i < kOuterRows ? rank - i : kOuterRows;
    int64_t c = column_begin;
    if (count == kOuterRows) {
      for (; c + kOuterColumns <= column_end; c += kOuterColumns) {
        vfloat total[kOuterRows][kOuterVectors] = {};
        for (int64_t m = 0; m < rows; m++) {
          vfloat values[kOuterVectors];
          for (int v = 0; v < kOuterVectors; v++) values[v] = load_as_float<dtype>(b, m * columns + c + v * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < kOuterRows; r++) {
            const vfloat factor = broadcast(a[m * rank + i + r]);
#pragma GCC unroll 2
            for (int v = 0; v < kOuterVectors; v++) total[r][v] += factor * values[v];
          }
        }
        for (int r = 0; r < kOuterRows; r++) {
          for (int v = 0; v < kOuterVectors; v++) store(out + (i + r) * columns + c + v * kLanes, total[r][v]);
        }
      }
    }
    for (int64_t r = i; r < i + count; r++) {
      for (int64_t tail = c; tail < column_end; tail++) {
        float total = 0;
        for (int64_t m = 0; m < rows; m++) total += a[m * rank + r] * element<dtype>(b, m * columns + tail);
        out[r * columns + tail] = total;
      }
    }
  }
}

void outer(const float* a, int64_t rank, const void* b, Dtype dtype, int64_t rows, int64_t columns,
           int64_t column_begin, int64_t column_end, float* out) {
  (dtype == kFloat32 ? outer_of<kFloat32> : outer_of<kBFloat16>)(a, rank, b, rows, columns, column_begin, column_end,
                                                                 out);
}

}  // namespace
