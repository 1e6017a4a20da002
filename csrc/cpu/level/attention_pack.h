// Matrices of a head in the layouts that the product kernel reads.
#pragma once

#include "attention_block.h"
#include "probability.h"
#include "transpose.h"
#include "units.h"

namespace {

constexpr int kBlock = kAttentionBlock;
constexpr int kMaxColumns = kMaxAttentionColumns;

static_assert(kBlock == kTileColumns, "a panel of the product kernel is as wide as a block");

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <bool kPairs>
constexpr int kBlockUnits = kBlock / kUnit<kPairs>;

inline const void* element(Dtype dtype, ConstRows rows, int64_t row, int64_t column) {
  return (const char*)rows.data + (row * rows.stride + column) * (dtype == kFloat32 ? 4 : 2);
}

inline float load_value(Dtype dtype, const void* from, int64_t index) {
  return dtype == kFloat32 ? ((const float*)from)[index] : int4::bfloat16_to_float(((const uint16_t*)from)[index]);
}

// out[row][unit of columns]; zero beyond the columns.
template <bool kPairs>
void pack_rows(Dtype dtype, ConstRows x, int64_t rows, int64_t columns, uint32_t* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r++) {
    to_units(element(dtype, x, r, 0), dtype, 1, columns, kPairs, out + r * stride, stride);
  }
}

// The same for a whole number of units of rows: zero beyond those of x.
template <bool kPairs>
void pack_whole_rows(Dtype dtype, ConstRows x, int64_t rows, int64_t columns, uint32_t* out) {
  const int64_t stride = ceil_div(columns, kUnit<kPairs>);
  pack_rows<kPairs>(dtype, x, rows, columns, out, stride);
  __builtin_memset(out + rows * stride, 0, (round_up(rows, kUnit<kPairs>) - rows) * stride * sizeof *out);
}

// out[unit of rows][column]; zero beyond the columns, and for the missing half of a last pair.
template <bool kPairs>
void pack_row_units(Dtype dtype, ConstRows x, int64_t rows, int64_t columns, uint32_t* out, int64_t stride) {
  if (!kPairs) return pack_rows<false>(dtype, x, rows, columns, out, stride);
  for (int64_t r = 0; r < rows; r += 2, out += stride) {
    const uint16_t* first = (const uint16_t*)element(dtype, x, r, 0);
    if (r + 1 < rows) {
      const uint16_t* second = (const uint16_t*)element(dtype, x, r + 1, 0);
      for (int64_t c = 0; c < columns; c++) out[c] = first[c] | (uint32_t)second[c] << 16;
    } else {
      for (int64_t c = 0; c < columns; c++) out[c] = first[c];
    }
    __builtin_memset(out + columns, 0, (stride - columns) * sizeof *out);
  }
}

// out[panel of kBlock columns][unit of rows][column].
template <bool kPairs>
void pack_panels(Dtype dtype, ConstRows x, int64_t rows, int64_t columns, uint32_t* out) {
  for (int64_t c = 0; c < columns; c += kBlock, out += kBlockUnits<kPairs> * kBlock) {
    const ConstRows panel = {element(dtype, x, 0, c), x.stride};
    pack_row_units<kPairs>(dtype, panel, rows, least(kBlock, columns - c), out, kBlock);
  }
}

typedef uint32_t Packing[kBlock * kMaxColumns];

// out[unit of columns][row], with kBlock rows: zero beyond those of x. Units up to a multiple of 16 are written, there and
// for each row to `packing`.
template <bool kPairs>
void pack_rows_transposed(Dtype dtype, ConstRows x, int64_t rows, int64_t columns, uint32_t* packing, uint32_t* out) {
  const int64_t units = ceil_div(columns, kUnit<kPairs>), stride = round_up(units, 16);
  pack_rows<kPairs>(dtype, x, rows, columns, packing, stride);
  __builtin_memset(packing + rows * stride, 0, (kBlock - rows) * stride * sizeof *packing);
  transpose(packing, stride, kBlock, units, out, kBlock);
}

// out[column][unit of rows], with kBlock rows. Columns up to a multiple of 16 are written.
template <bool kPairs>
void pack_row_units_transposed(Dtype dtype, ConstRows x, int64_t rows, int64_t columns, Packing& packing,
                               uint32_t* out) {
  const int64_t stride = round_up(columns, 16);
  pack_row_units<kPairs>(dtype, x, rows, columns, packing, stride);
  transpose(packing, stride, round_up(ceil_div(rows, kUnit<kPairs>), 16), columns, out, kBlockUnits<kPairs>);
}

// Up to kBlock keys with their values. The forward contracts the columns of K and the rows of V, the backward the
// columns of both and the rows of K: it has V where the forward has nothing, and the panels are K's instead of V's.
template <bool kPairs>
struct KeyTile {
  int64_t units, value_units, value, panels, words;

  KeyTile(const AttentionKind& kind, bool backward)
      : units(ceil_div(kind.columns, kUnit<kPairs>)), value_units(ceil_div(kind.value_columns, kUnit<kPairs>)) {
    value = round_up(units, kSquare) * kBlock;
    panels = value + (backward ? round_up(value_units, kSquare) * kBlock : 0);
    words = panels + round_up(backward ? kind.columns : kind.value_columns, kBlock) * kBlockUnits<kPairs>;
  }
};

template <bool kPairs>
void pack_keys(const AttentionKind& kind, bool backward, ConstRows k, ConstRows v, int64_t keys, Packing& packing,
               uint32_t* out) {
  const KeyTile<kPairs> tile(kind, backward);
  pack_rows_transposed<kPairs>(kind.dtype, k, keys, kind.columns, packing, out);
  if (backward) {
    pack_rows_transposed<kPairs>(kind.dtype, v, keys, kind.value_columns, packing, out + tile.value);
    pack_panels<kPairs>(kind.dtype, k, keys, kind.columns, out + tile.panels);
  } else {
    pack_panels<kPairs>(kind.dtype, v, keys, kind.value_columns, out + tile.panels);
  }
}

// A row of float32, which can be read up to a whole number of vectors.
inline void store_row(Dtype dtype, const float* values, int64_t columns, void* out) {
  if (dtype == kFloat32) {
    __builtin_memcpy(out, values, columns * sizeof *values);
    return;
  }
  uint16_t* to = (uint16_t*)out;
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) store_bfloat16(to + c, load<vfloat>(values + c));
  if (c < columns) {
    uint16_t rounded[kLanes];
    store_bfloat16(rounded, load<vfloat>(values + c));
    __builtin_memcpy(to + c, rounded, (columns - c) * sizeof *to);
  }
}

inline void* element(Dtype dtype, Rows rows, int64_t row, int64_t column) {
  return const_cast<void*>(element(dtype, ConstRows{rows.data, rows.stride}, row, column));
}

// The same times a factor, for values in panels of kBlock columns, `stride` apart.
inline void store_panel_row(Dtype dtype, const float* values, int64_t stride, int64_t columns, float factor, void* out) {
  const ConstRows row = {out, 0};
  for (int64_t c = 0; c < columns; c += kBlock, values += stride) {
    float scaled[kBlock];
    for (int i = 0; i < kBlock; i += kLanes) store(scaled + i, load<vfloat>(values + i) * factor);
    store_row(dtype, scaled, least(kBlock, columns - c), const_cast<void*>(element(dtype, row, 0, c)));
  }
}

}  // namespace
