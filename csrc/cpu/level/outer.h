// aᵀ b for a narrow a: the gradients of LoRA's matrices, summed over the rows of the batch in float32.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using namespace entrenar;

constexpr int kOuterRows = 8;                        // rows of the result in registers
constexpr int kOuterVectors = kLanes == 16 ? 2 : 1;  // vectors of each
constexpr int kOuterColumns = kOuterVectors * kLanes;

// A step takes one row of a and b in float32, or two of bfloat16 in the halves of a word. A word of a is broadcast to
// all columns of b.
template <Dtype dtype>
struct OuterStep {
  static constexpr int kRows = 1;

  static float element(const void* b, int64_t index) {
    if (dtype == kFloat32) return ((const float*)b)[index];
    return int4::bits_float((uint32_t)((const uint16_t*)b)[index] << 16);
  }

  static void load_row(const void* b, int64_t columns, int64_t, int64_t row, int64_t c, vuint* words) {
    for (int v = 0; v < kOuterVectors; v++) {
      const int64_t index = row * columns + c + v * kLanes;
      words[v] = bits_of(dtype == kFloat32 ? load<vfloat>((const float*)b + index)
                                           : load_bfloat16((const uint16_t*)b + index));
    }
  }

  static vfloat multiply_add(vfloat total, uint32_t a, vuint b) { return total + int4::bits_float(a) * (vfloat)b; }

  static float multiply_add(float total, uint32_t a, const void* b, int64_t columns, int64_t, int64_t row, int64_t c) {
    return total + int4::bits_float(a) * element(b, row * columns + c);
  }

  static uint32_t pack(const void* a, int64_t rank, int64_t, int64_t row, int64_t i) {
    return int4::float_bits(element(a, row * rank + i));
  }
};

#if defined(__AVX512BF16__)
template <>
struct OuterStep<kBFloat16> {
  static constexpr int kRows = 2;

  static uint32_t word(const void* from, int64_t columns, int64_t rows, int64_t row, int64_t c) {
    const uint16_t* first = (const uint16_t*)from + row * columns + c;
    return first[0] | (row + 1 < rows ? (uint32_t)first[columns] << 16 : 0);
  }

  static void load_row(const void* b, int64_t columns, int64_t rows, int64_t row, int64_t c, vuint* words) {
    const uint16_t* first = (const uint16_t*)b + row * columns + c;
    for (int v = 0; v < kOuterVectors; v++, first += kLanes) {
      words[v] = widen(load<vhalfword>(first));
      if (row + 1 < rows) words[v] |= widen(load<vhalfword>(first + columns)) << 16;
    }
  }

  static vfloat multiply_add(vfloat total, uint32_t a, vuint b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }

  static float multiply_add(float total, uint32_t a, const void* b, int64_t columns, int64_t rows, int64_t row,
                            int64_t c) {
    return multiply_add(broadcast(total), a, vuint{} + word(b, columns, rows, row, c))[0];
  }

  static uint32_t pack(const void* a, int64_t rank, int64_t rows, int64_t row, int64_t i) {
    return word(a, rank, rows, row, i);
  }
};
#endif

template <Dtype dtype>
void pack_outer_of(const void* a, int64_t rows, int64_t rank, uint32_t* packed) {
  using Step = OuterStep<dtype>;
  for (int64_t row = 0; row < rows; row += Step::kRows) {
    for (int64_t i = 0; i < rank; i++) *packed++ = Step::pack(a, rank, rows, row, i);
  }
}

// A matrix [rank, columns] in memory, or its transpose.
struct OuterResult {
  float* data;
  int64_t row_stride, column_stride;

  float* at(int64_t i, int64_t c) const { return data + i * row_stride + c * column_stride; }

  // A block from row i and column c on, whose rows are `stride` apart.
  void put(int64_t i, int64_t c, int64_t height, int64_t width, const float* block, int64_t stride) const {
    if (column_stride == 1) {
      for (int64_t r = 0; r < height; r++) __builtin_memcpy(at(i + r, c), block + r * stride, width * sizeof(float));
    } else {
      for (int64_t column = 0; column < width; column++) {
        for (int64_t r = 0; r < height; r++) *at(i + r, c + column) = block[r * stride + column];
      }
    }
  }
};

// kOuterRows rows of the result from row i on, kOuterColumns columns from c on.
template <Dtype dtype>
inline void outer_block(const uint32_t* a, int64_t rank, const void* b, int64_t rows, int64_t columns, int64_t i,
                        int64_t c, const OuterResult& out) {
  using Step = OuterStep<dtype>;
  vfloat total[kOuterRows][kOuterVectors] = {};
  for (int64_t row = 0; row < rows; row += Step::kRows) {
    const uint32_t* factors = a + row / Step::kRows * rank + i;
    vuint words[kOuterVectors];
    Step::load_row(b, columns, rows, row, c, words);
#pragma GCC unroll 8
    for (int r = 0; r < kOuterRows; r++) {
#pragma GCC unroll 2
      for (int v = 0; v < kOuterVectors; v++) total[r][v] = Step::multiply_add(total[r][v], factors[r], words[v]);
    }
  }
  out.put(i, c, kOuterRows, kOuterColumns, (const float*)total, kOuterColumns);
}

template <Dtype dtype>
inline void outer_element(const uint32_t* a, int64_t rank, const void* b, int64_t rows, int64_t columns, int64_t i,
                          int64_t c, const OuterResult& out) {
  using Step = OuterStep<dtype>;
  float total = 0;
  for (int64_t row = 0; row < rows; row += Step::kRows) {
    total = Step::multiply_add(total, a[row / Step::kRows * rank + i], b, columns, rows, row, c);
  }
  *out.at(i, c) = total;
}

template <Dtype dtype>
void outer_of(const uint32_t* a, int64_t rank, const void* b, int64_t rows, int64_t columns, int64_t column_begin,
              int64_t column_end, const OuterResult& out) {
  // The columns go outside, for then a strip of b is still in the cache when its turn comes again.
  for (int64_t c = column_begin; c < column_end; c += kOuterColumns) {
    int64_t i = 0;
    if (c + kOuterColumns <= column_end) {
      for (; i + kOuterRows <= rank; i += kOuterRows) outer_block<dtype>(a, rank, b, rows, columns, i, c, out);
    }
    const int64_t end = c + kOuterColumns < column_end ? c + kOuterColumns : column_end;
    for (; i < rank; i++) {
      for (int64_t column = c; column < end; column++) {
        outer_element<dtype>(a, rank, b, rows, columns, i, column, out);
      }
    }
  }
}

}  // namespace
