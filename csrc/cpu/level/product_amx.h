// Products of bfloat16 in the matrix registers. As in product.h a tile of the weight is decoded into the cache and
// multiplied by all rows of x. These products are so fast that moving the sums would cost as much: a tile is as deep as the
// cache allows, an adapter's matrix joins the tile before it, and the last tile's sums go from the registers to y.
//
// A register's rows are rows of x, and the tile is a panel of columns, for y = x wᵀ transposed. Where x is small it is
// the panel: then they are rows of the weight, just as they are decoded, and the sums are yᵀ.
#pragma once

#include "amx.h"
#include "product.h"
#include "rows_amx.h"

#if defined(__AMX_BF16__)

namespace {

using namespace entrenar;

namespace amx {

constexpr int kVectors = kTileColumns / kUnits;
constexpr int64_t kPanelDepth = 576;      // elements of one weight in a tile, or a little more
constexpr int64_t kRowsDepth = 384;       // the same where its rows are the registers' rows
constexpr int64_t kTileDepthUnits = 336;  // of all weights
constexpr int64_t kStrip = 512;           // columns of y, for which x stays in the cache
constexpr int64_t kNearBytes = 1 << 20;   // of x, which then stays there in any case

// Where x is the panel, and where it is the rows.
TileSizes tile_sizes(const Product& p) {
  return p.tiles ? TileSizes{kRowsDepth, kQuad, kQuad / 2, 2, kTileDepthUnits}
                 : TileSizes{kPanelDepth, kQuad, kWide, 2, kTileDepthUnits};
}

struct Scratch {
  uint32_t panel[kVectors][kTileDepthUnits][kUnits];
  uint32_t rows[kTall][kTileDepthUnits];    // of the weight, in their order or before they become columns of the panel
  alignas(64) float result[kTall][kWide];   // of the last tile
  float sums[];                             // squares, by strips, columns and rows of x
};

// The codes that a row's place will take in the next tile: of the row itself, or of one in the next strip.
inline void prefetch_next(const Weight& w, const Piece& piece, int64_t row) {
  constexpr int64_t kLine = 64;
  int64_t column = piece.begin + piece.depth;
  if (column >= w.columns) column = 0, row += kStrip;
  if (row >= w.rows) return;
  const uint8_t* codes = group_of(w, row, column);
  for (int64_t i = 0; i < piece.depth / 2; i += kLine) __builtin_prefetch(codes + i, 0, 2);
}

// Rows [row, row + count) of the weight to columns of the panel.
inline void fill_columns(const Weight& w, const Piece& piece, int64_t row, int64_t count, Scratch* scratch, int vector) {
  for (int64_t n = 0; n < count; n++) {
    uint32_t* out = scratch->rows[n];
    if (w.codes) prefetch_next(w, piece, row + n);
    Decoded<true>::load_row(w, kBFloat16, row + n, piece.begin, piece.depth, out);
    const int64_t filled = w.codes ? int4::groups(piece.depth) * int4::kGroup / 2 : (piece.depth + 1) / 2;
    __builtin_memset(out + filled, 0, (piece.units - filled) * sizeof(uint32_t));
  }
  transpose(scratch->rows[0], kTileDepthUnits, kUnits, piece.units, scratch->panel[vector][piece.unit], kUnits);
}

// Columns [column, column + columns) of pairs of rows of the weight to rows of the panel.
inline void fill_rows(const Weight& w, const Piece& piece, int64_t column, int64_t columns, Scratch* scratch) {
  for (int64_t u = 0; u < piece.units; u++) {
    alignas(64) uint32_t unit[kTileColumns] = {};
    if (2 * u < piece.depth) Decoded<true>::load_unit(w, kBFloat16, piece.begin + 2 * u, column, columns, unit);
    for (int v = 0; v < kVectors; v++) {
      ::store(scratch->panel[v][piece.unit + u], ::load<vuint>(unit + v * kUnits));
    }
  }
}

inline void fill_panel(const Product& p, const Cursor& at, int64_t column, int64_t columns, Scratch* scratch) {
  for (const Piece* piece = at.pieces; piece < at.pieces + at.count; piece++) {
    const Weight& w = p.w[piece->term];
    if (!p.transposed) {
      fill_rows(w, *piece, column, columns, scratch);
      continue;
    }
    for (int64_t c = 0; c < columns; c += kUnits) {
      fill_columns(w, *piece, column + c, columns - c < kUnits ? columns - c : kUnits, scratch, c / kUnits);
    }
  }
}

// Up to 32 columns of the tile, from `column` of y on, for all rows. Of sums, squares lie one after another.
inline void multiply_columns(const Product& p, const Cursor& at, int64_t row_begin, int64_t row_end, int64_t column,
                             int64_t columns, Scratch* scratch, int vector, float* sums, bool first) {
  const Sums result = {scratch->result[0], kWide, kUnits, kRows * kWide};
  for (int64_t row = row_begin; row < row_end; row += kTall, sums += 4 * kSquare) {
    const int64_t rows = row_end - row < kTall ? row_end - row : kTall;
    Factors factors[kMaxTerms];
    for (int i = 0; i < at.count; i++) {
      const Piece& piece = at.pieces[i];
      const Units& x = p.x[piece.term];
      factors[i] = {x.data + row * x.stride + piece.begin / 2, x.stride, scratch->panel[vector][piece.unit],
                    scratch->panel[vector + 1][piece.unit], kUnits, piece.units};
    }
    const Sums squares = {sums, kUnits, kSquare, 2 * kSquare};
    multiply<Far::kRows>(rows, columns, kUnits, factors, at.count, first ? nullptr : &squares,
                         at.done() ? result : squares);
    for (int64_t r = 0; at.done() && r < rows; r++) store_columns(p, row + r, column, columns, scratch->result[r]);
  }
}

void product_of_panels(const Product& p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                       Scratch* scratch) {
  const int64_t half_sums = (row_end - row_begin + kTall - 1) / kTall * kTall * kWide;
  const Registers registers;
  for (int64_t strip = column_begin; strip < column_end; strip += kStrip) {
    const int64_t strip_end = column_end - strip < kStrip ? column_end : strip + kStrip;
    Cursor at = {p, tile_sizes(p)};
    for (bool first = true; first || !at.done(); first = false) {
      at.next();
      float* sums = scratch->sums;
      for (int64_t column = strip; column < strip_end; column += kTileColumns) {
        const int64_t columns = strip_end - column < kTileColumns ? strip_end - column : kTileColumns;
        fill_panel(p, at, column, columns, scratch);
        for (int64_t c = 0; c < columns; c += kWide, sums += half_sums) {
          const int64_t count = columns - c < kWide ? columns - c : kWide;
          multiply_columns(p, at, row_begin, row_end, column + c, count, scratch, c / kUnits, sums, first);
        }
      }
    }
  }
}

// A part of x wᵀ, from the sums, which are its transpose.
inline void store_transposed(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                             const float (*sums)[kWide]) {
  alignas(64) float y[kWide][kTall];
  for (int64_t i = 0; i < columns; i += kRows) {
    for (int64_t j = 0; j < rows; j += kUnits) {
      transpose_square((const uint32_t*)&sums[i][j], kWide, (uint32_t*)&y[j][i], kTall);
    }
  }
  for (int64_t r = 0; r < rows; r++) store_columns(p, row + r, column, columns, y[r]);
}

// Up to 32 columns of y, from `column` on, for all rows.
inline void multiply_rows(const Product& p, const Cursor& at, int64_t row_begin, int64_t row_end, int64_t column,
                          int64_t columns, Scratch* scratch, float* sums, bool first) {
  const Sums result = {scratch->result[0], kWide, kUnits, kRows * kWide};
  const int64_t width = tile_width(p.rows);
  for (int64_t row = row_begin; row < row_end; row += 2 * width, sums += 4 * kSquare) {
    const int64_t rows = row_end - row < 2 * width ? row_end - row : 2 * width;
    Factors factors[kMaxTerms];
    for (int i = 0; i < at.count; i++) {
      const Piece& piece = at.pieces[i];
      const Units& x = p.x[piece.term];
      const uint32_t* left = x.data + row * x.stride + piece.begin / 2 * width;
      factors[i] = {scratch->rows[0] + piece.unit, kTileDepthUnits, left, left + width * x.stride, width, piece.units};
    }
    const Sums squares = {sums, kUnits, kSquare, 2 * kSquare};
    const auto tall = rows > width ? multiply<true, true, Far::kColumns> : multiply<true, false, Far::kColumns>;
    const auto low = rows > width ? multiply<false, true, Far::kColumns> : multiply<false, false, Far::kColumns>;
    (columns > kRows ? tall : low)(factors, at.count, first ? nullptr : &squares, at.done() ? result : squares);
    if (at.done()) store_transposed(p, row, rows, column, columns, scratch->result);
  }
}

void product_of_tiles(const Product& p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                      Scratch* scratch) {
  const Registers registers(tile_width(p.rows));
  const int64_t sums_size = (row_end - row_begin + kTall - 1) / kTall * 4 * kSquare;
  const bool near = (row_end - row_begin) * p.x[0].stride * (int64_t)sizeof(uint32_t) <= kNearBytes;
  const int64_t strip_width = near ? kTall : kStrip;
  for (int64_t strip = column_begin; strip < column_end; strip += strip_width) {
    const int64_t strip_end = column_end - strip < strip_width ? column_end : strip + strip_width;
    Cursor at = {p, tile_sizes(p)};
    for (bool first = true; first || !at.done(); first = false) {
      at.next();
      float* sums = scratch->sums;
      for (int64_t column = strip; column < strip_end; column += kTall, sums += sums_size) {
        const int64_t columns = strip_end - column < kTall ? strip_end - column : kTall;
        for (const Piece* piece = at.pieces; piece < at.pieces + at.count; piece++) {
          const Weight& w = p.w[piece->term];
          decode_rows(w, column, columns, piece->begin, piece->depth, strip_width, scratch->rows[0] + piece->unit,
                      kTileDepthUnits);
        }
        multiply_rows(p, at, row_begin, row_end, column, columns, scratch, sums, first);
      }
    }
  }
}

void product(const Product& p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
             Scratch* scratch) {
  (p.tiles ? product_of_tiles : product_of_panels)(p, row_begin, row_end, column_begin, column_end, scratch);
}

int64_t scratch_bytes(int64_t rows) {
  return sizeof(Scratch) + (rows + kTall - 1) / kTall * kTall * kStrip * sizeof(float);
}

}  // namespace amx

}  // namespace

#endif
