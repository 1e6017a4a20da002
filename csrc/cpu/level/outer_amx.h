// The product of outer.h for bfloat16 in the matrix registers: columns of a are rows of its x, and pairs of rows of b its
// panel.
#pragma once

#include "amx.h"
#include "outer.h"
#include "transpose.h"

#if defined(__AMX_BF16__)

namespace {

using namespace entrenar;

namespace amx {

constexpr int64_t kOuterUnits = 128;  // pairs of rows in a panel
constexpr int64_t kRowsAhead = 32;    // how far ahead of their use rows of b are fetched

int64_t outer_stride(int64_t rows) { return (rows + 2 * kUnits - 1) / (2 * kUnits) * kUnits; }

// packed[column][pair of rows], zeros past the last row.
void pack_outer(const uint16_t* a, int64_t rows, int64_t rank, uint32_t* packed) {
  const int64_t stride = outer_stride(rows);
  for (int64_t i = 0; i < rank; i += kRows) {
    const int64_t count = rank - i < kRows ? rank - i : kRows;
    for (int64_t pair = 0; pair < stride; pair += kUnits) {
      uint32_t words[kUnits][kRows] = {}, transposed[kRows][kUnits];
      for (int64_t u = 0; u < kUnits && 2 * (pair + u) < rows; u++) {
        for (int64_t c = 0; c < count; c++) words[u][c] = OuterStep<kBFloat16>::word(a, rank, rows, 2 * (pair + u), i + c);
      }
      transpose_square(words[0], kRows, transposed[0], kUnits);
      for (int64_t c = 0; c < count; c++) {
        __builtin_memcpy(packed + (i + c) * stride + pair, transposed[c], sizeof transposed[c]);
      }
    }
  }
}

struct OuterPanel {
  alignas(64) uint32_t words[2][kOuterUnits][kUnits];

  // A row of these columns, or past the last one of the next.
  static void prefetch(const uint16_t* b, int64_t rows, int64_t columns, int64_t row, int64_t c) {
    __builtin_prefetch(row < rows ? b + row * columns + c : b + (row - rows) * columns + c + kWide);
  }

  // `units` pairs of rows from `pair` on, of up to 32 columns from c on.
  void fill(const uint16_t* b, int64_t rows, int64_t columns, int64_t pair, int64_t units, int64_t c, int64_t count) {
    using Step = OuterStep<kBFloat16>;
    for (int64_t u = 0; u < units; u++) {
      const int64_t row = 2 * (pair + u);
      vuint halves[2] = {};
      prefetch(b, rows, columns, row + kRowsAhead, c);
      prefetch(b, rows, columns, row + 1 + kRowsAhead, c);
      if (row < rows && count == kWide) {
        Step::load_row(b, columns, rows, row, c, halves);
      } else if (row < rows) {
        uint32_t some[kWide] = {};
        for (int64_t i = 0; i < count; i++) some[i] = Step::word(b, columns, rows, row, c + i);
        halves[0] = ::load<vuint>(some), halves[1] = ::load<vuint>(some + kUnits);
      }
      ::store(words[0][u], halves[0]);
      ::store(words[1][u], halves[1]);
    }
  }
};

void outer(const uint32_t* packed, int64_t rank, const uint16_t* b, int64_t rows, int64_t columns, int64_t column_begin,
           int64_t column_end, const OuterResult& out) {
  static_assert(kOuterColumns == kWide, "a strip of b is as wide as the sums");
  const Registers registers;
  const int64_t stride = outer_stride(rows);
  OuterPanel panel;
  alignas(64) float result[kTall][kWide] = {};  // which it stays where b has no rows
  const Sums sums = {result[0], kWide, kUnits, kRows * kWide};
  for (int64_t c = column_begin; c < column_end; c += kWide) {
    const int64_t count = column_end - c < kWide ? column_end - c : kWide;
    for (int64_t i = 0; i < rank; i += kTall) {
      const int64_t height = rank - i < kTall ? rank - i : kTall;
      for (int64_t pair = 0; pair < stride; pair += kOuterUnits) {
        const int64_t units = stride - pair < kOuterUnits ? stride - pair : kOuterUnits;
        panel.fill(b, rows, columns, pair, units, c, count);
        const Factors factors = {packed + i * stride + pair, stride, panel.words[0][0], panel.words[1][0], kUnits, units};
        multiply<Far::kNone>(height, count, kUnits, &factors, 1, pair ? &sums : nullptr, sums);
      }
      out.put(i, c, height, count, result[0], kWide);
    }
  }
}

}  // namespace amx

}  // namespace

#endif
