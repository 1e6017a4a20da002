// Products of matrices with many rows of x. A tile of the weights, 64 columns wide, is decoded into the cache once and
// multiplied by all rows of x: as much of the contraction as a tile has room for, an adapter's matrix after the weight's.
#pragma once

#include "int8.h"
#include "panel.h"
#include "pieces.h"
#include "store.h"
#include "transpose.h"

namespace {

using namespace entrenar;

constexpr int64_t kTileUnits = 320;  // at most

// Deep, for sums are moved once a tile, but not so that the rows of x leave a second-level cache of 1 MiB. Beside as much
// of one weight as a tile takes there is room for an adapter of rank 64.
template <bool kPairs>
constexpr TileSizes kTileSizes = kPairs ? TileSizes{576, 2 * int4::kGroup, 2, 2, kTileUnits}
                                        : TileSizes{192, 2 * int4::kGroup, 1, 1, 256};

struct Scratch {
  alignas(64) uint32_t panel[kTileUnits + kSquare][kTileColumns];  // [unit][column], what the microkernel reads
  uint32_t decoded[kSquare][kTileUnits];  // [column][unit], before it is transposed into the panel
  Int8Panel int8;
  alignas(64) float sums[];  // [row][column of the tile]
};

int64_t scratch_bytes(int64_t rows) { return sizeof(Scratch) + rows * kTileColumns * sizeof(float); }

template <bool kPairs>
void fill_panel(const Product& p, const Piece& piece, int64_t column, int64_t columns, Scratch* scratch) {
  const Weight& w = p.w[piece.term];
  uint32_t(*panel)[kTileColumns] = scratch->panel + piece.unit;
  if (!p.transposed) {
    for (int64_t u = 0; u < piece.units; u++) {
      Decoded<kPairs>::load_unit(w, p.dtype, piece.begin + u * Tile<kPairs>::kUnit, column, columns, panel[u]);
    }
    return;
  }
  for (int64_t n = 0; n < columns; n += kSquare) {
    const int64_t count = columns - n < kSquare ? columns - n : kSquare;
    for (int64_t i = 0; i < count; i++) {
      Decoded<kPairs>::load_row(w, p.dtype, column + n + i, piece.begin, piece.depth, scratch->decoded[i]);
    }
    // What this writes past the last unit is overwritten by the next piece.
    transpose(scratch->decoded[0], kTileUnits, count, piece.units, panel[0] + n, kTileColumns);
  }
}

// A tile of the weights for columns [column, column + columns) of y, and the rows that it is multiplied by.
struct Job {
  const Product& p;
  const Cursor& at;  // whose pieces lie in the panel; int8 has another one
  int64_t row_begin, rows, column, columns;
  Scratch* scratch;
  bool first;  // there are no sums yet
  bool last;   // the sums go on to y
};

// For kRows rows from `r` on, and vectors from v on. Where gcc 12 inlines it, AVX2's takes twice the time.
template <bool kPairs, bool kInt8, int kRows, int kVectors>
__attribute__((noinline)) void micro(const Job& job, int64_t r, int64_t v) {
  const Product& p = job.p;
  const int64_t row = job.row_begin + r;
  float* const sums = job.scratch->sums + r * kTileColumns + v * kLanes;
  vfloat total[kRows][kVectors];
  load_sums(total, sums, job.first);
  if (kInt8) add_int8(total, p.int8, job.scratch->int8, row, v);
  for (const Piece* piece = job.at.pieces; piece < job.at.pieces + job.at.count; piece++) {
    const Units& x = p.x[piece->term];
    const Units rows = {x.data + row * x.stride + piece->begin / Tile<kPairs>::kUnit, x.stride};
    multiply_add<kPairs, true>(total, rows, job.scratch->panel[piece->unit] + v * kLanes, piece->units);
  }
  if (!job.last) {
    store_sums(total, sums);
  } else if (kPairs || p.dtype == kBFloat16) {
    store_y<kBFloat16>(total, p, row, job.column + v * kLanes);
  } else {
    store_y<kFloat32>(total, p, row, job.column + v * kLanes);
  }
}

template <bool kPairs, bool kInt8>
void multiply(const Job& job) {
  const int vectors = (job.columns + kLanes - 1) / kLanes;
  for_parts<kInt8 ? kInt8Vectors : kMicroVectors>(vectors, [&](auto width, int64_t v) {
    constexpr int kVectors = decltype(width)::kNumber;
    for_parts<kInt8 ? kInt8Rows : micro_rows(kVectors)>(job.rows, [&](auto height, int64_t r) {
      micro<kPairs, kInt8, decltype(height)::kNumber, kVectors>(job, r, v);
    });
  });
}

template <bool kPairs>
void product_of(const Product& p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                Scratch* scratch) {
  const int64_t int8_end = p.int8.codes ? p.w[0].columns : 0;
  const int64_t int8_step = int8_end ? part_depth(int8_end, Int8Panel::kUnits * kInt8Unit, 2 * int4::kGroup) : 0;
  for (int64_t column = column_begin; column < column_end; column += kTileColumns) {
    const int64_t columns = column_end - column < kTileColumns ? column_end - column : kTileColumns;
    Cursor at = {p, kTileSizes<kPairs>, p.int8.codes ? 1 : 0};
    Job job = {p, at, row_begin, row_end - row_begin, column, columns, scratch, true, false};
    int64_t int8_begin = 0;
    do {
      const int64_t rest = int8_end - int8_begin, depth = rest < int8_step ? rest : int8_step;
      if (depth > 0) fill_int8(p.w[0], int8_begin, depth, column, columns, scratch->int8);
      int8_begin += depth;
      const bool rounded = int8_begin == int8_end;
      if (rounded) at.next();
      for (const Piece* piece = at.pieces; piece < at.pieces + at.count; piece++) {
        fill_panel<kPairs>(p, *piece, column, columns, scratch);
      }
      job.last = rounded && at.done() && columns % kLanes == 0;
      depth > 0 ? multiply<kPairs, true>(job) : multiply<kPairs, false>(job);
      job.first = false;
    } while (int8_begin < int8_end || !at.done());
    for (int64_t r = 0; !job.last && r < job.rows; r++) {
      store_columns(p, row_begin + r, column, columns, scratch->sums + r * kTileColumns);
    }
  }
}

}  // namespace
