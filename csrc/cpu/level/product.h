// Matrix products with many rows of x. A tile of the weight, up to 192 units deep and 64 columns wide, is decoded into
// the cache once and multiplied by all rows of x; the sums stay in float32 until every tile of a column is done.
#pragma once

#include "amx.h"
#include "codec.h"
#include "int8.h"
#include "store.h"
#include "transpose.h"

namespace {

using namespace entrenar;

#if defined(__AVX512BF16__)
constexpr bool kBFloat16Units = true;
#else
constexpr bool kBFloat16Units = false;
#endif

// Registers of the microkernel: rows x vectors sums, and a few for its operands.
constexpr int kMicroVectors = kLanes == 16 ? 4 : 2;
constexpr int micro_rows(int vectors) { return kLanes == 16 ? (vectors <= 2 ? 12 : 6) : kLanes == 8 ? 6 : 4; }

struct Scratch {
  uint32_t panel[kTileUnits * kTileColumns];   // [unit][column], what the microkernel reads
  uint32_t decoded[kTileColumns * kTileUnits]; // [column][unit], before it is transposed into the panel
  float scales[kTileUnits * kInt8Unit / int4::kGroup * kTileColumns];  // [block][column], of codes in int8
  float sums[];                                // [row][column of the tile]
};

int64_t scratch_bytes(int64_t rows) { return sizeof(Scratch) + rows * kTileColumns * sizeof(float); }

void to_units(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool bfloat16_units, uint32_t* out,
              int64_t stride) {
  for (int64_t m = 0; m < rows; m++, out += stride) {
    if (bfloat16_units || dtype == kFloat32) {
      const int64_t bytes = columns * (dtype == kFloat32 ? 4 : 2);
      __builtin_memcpy(out, (const char*)x + m * bytes, bytes);
      __builtin_memset((char*)out + bytes, 0, stride * 4 - bytes);
    } else {
      const uint16_t* from = (const uint16_t*)x + m * columns;
      for (int64_t i = 0; i < columns; i++) out[i] = (uint32_t)from[i] << 16;
      __builtin_memset(out + columns, 0, (stride - columns) * 4);
    }
  }
}

// How a tile is held: float32 values, or pairs of bfloat16 that are neighbours in the contraction.
template <bool kPairs>
struct Tile;

template <>
struct Tile<false> {
  static constexpr int kUnit = 1;  // elements

  static vfloat multiply_add(vfloat total, uint32_t x, vuint panel) {
    return total + int4::bits_float(x) * (vfloat)panel;
  }

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
struct Tile<true> {
  static constexpr int kUnit = 2;

  static vfloat multiply_add(vfloat total, uint32_t x, vuint panel) {
    return (vfloat)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(x), (__m512bh)panel);
  }

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

// sums[kRows][kVectors] (+)= x panel, over `units` units.
template <bool kPairs, int kRows, int kVectors>
void micro(const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t units, float* sums, bool first) {
  vfloat total[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      total[r][v] = first ? vfloat{} : load<vfloat>(sums + r * kTileColumns + v * kLanes);
    }
  }
  for (int64_t u = 0; u < units; u++) {
    vuint columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) columns[v] = load<vuint>(panel + u * kTileColumns + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const uint32_t value = load<uint32_t>(x + r * stride + u);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) total[r][v] = Tile<kPairs>::multiply_add(total[r][v], value, columns[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(sums + r * kTileColumns + v * kLanes, total[r][v]);
  }
}

template <bool kPairs, int kVectors, int kRows = micro_rows(kVectors)>
inline void micro_of(int64_t rows, const uint32_t* x, int64_t stride, const uint32_t* panel, int64_t units, float* sums,
                     bool first) {
  if (rows == kRows) {
    micro<kPairs, kRows, kVectors>(x, stride, panel, units, sums, first);
  } else if constexpr (kRows > 1) {
    micro_of<kPairs, kVectors, kRows - 1>(rows, x, stride, panel, units, sums, first);
  }
}

template <bool kPairs, int kVectors>
void multiply(int64_t rows, const Units& x, const uint32_t* panel, int64_t units, float* sums, bool first) {
  constexpr int kStep = micro_rows(kVectors);
  for (int64_t r = 0; r < rows; r += kStep) {
    const int64_t count = rows - r < kStep ? rows - r : kStep;
    micro_of<kPairs, kVectors>(count, x.data + r * x.stride, x.stride, panel, units, sums + r * kTileColumns, first);
  }
}

// What must live around calls of multiply_tile.
template <bool kPairs>
struct Multiplying {
  ~Multiplying() {}  // or it would be an unused variable
};

#if defined(__AMX_BF16__)

template <>
struct Multiplying<true> {
  amx::Registers registers;
};

// Less than 32 rows or columns, or units that do not fill the registers.
__attribute__((noinline)) void multiply_part(int64_t rows, int64_t columns, amx::Factors factors, bool first,
                                             const amx::Sums& sums) {
  const int64_t rest = factors.units % amx::kUnits;
  factors.units -= rest;
  if (factors.units != 0 || first) {  // without units as well, for sums of 0
    amx::multiply<amx::Far::kNone>(rows, columns, amx::kUnits, &factors, 1, first ? nullptr : &sums, sums);
  }
  if (rest != 0) {
    const int64_t done = factors.units * factors.panel_stride;
    factors = {factors.x + factors.units, factors.x_stride, factors.left + done, factors.right + done,
               factors.panel_stride, rest};
    amx::multiply<amx::Far::kNone>(rows, columns, rest, &factors, 1, &sums, sums);
  }
}

inline void multiply_tile_amx(int vectors, int64_t rows, const Units& x, const uint32_t* panel, int64_t units,
                              float* sums, bool first) {
  constexpr int64_t kStride = kTileColumns, kNearUnits = 64;
  for (int64_t r = 0; r < rows; r += amx::kTall) {
    for (int v = 0; v < vectors; v += 2) {
      const uint32_t* left = panel + v * amx::kUnits;
      const amx::Factors factors = {x.data + r * x.stride, x.stride, left, left + amx::kUnits, kStride, units};
      const amx::Sums at = {sums + r * kStride + v * amx::kUnits, kStride, amx::kUnits, amx::kRows * kStride};
      const bool whole = rows - r >= amx::kTall && vectors - v >= 2 && units % amx::kUnits == 0;
      if (whole && units <= kNearUnits) {
        amx::multiply_near(factors, first, at);
      } else if (whole) {
        amx::multiply<true, true, amx::Far::kColumns>(&factors, 1, first ? nullptr : &at, at);
      } else {
        multiply_part(rows - r < amx::kTall ? rows - r : amx::kTall, vectors - v < 2 ? amx::kUnits : amx::kWide, factors,
                      first, at);
      }
    }
  }
}

#endif

template <bool kPairs>
void multiply_tile(int vectors, int64_t rows, const Units& x, const uint32_t* panel, int64_t units, float* sums,
                   bool first) {
#if defined(__AMX_BF16__)
  if constexpr (kPairs) return multiply_tile_amx(vectors, rows, x, panel, units, sums, first);
#endif
  for (int v = 0; v < vectors; v += kMicroVectors, panel += kMicroVectors * kLanes, sums += kMicroVectors * kLanes) {
    const int count = vectors - v;
    if (count == 1) {
      multiply<kPairs, 1>(rows, x, panel, units, sums, first);
    } else if (count == 2 || kMicroVectors == 2) {
      multiply<kPairs, 2>(rows, x, panel, units, sums, first);
    } else if (count == 3) {
      multiply<kPairs, (kMicroVectors < 3 ? kMicroVectors : 3)>(rows, x, panel, units, sums, first);
    } else {
      multiply<kPairs, kMicroVectors>(rows, x, panel, units, sums, first);
    }
  }
}

template <bool kPairs>
void fill_panel(const Product& p, const Weight& w, int64_t q, int64_t depth, int64_t column, int64_t columns,
                Scratch* scratch) {
  const int64_t units = (depth + Tile<kPairs>::kUnit - 1) / Tile<kPairs>::kUnit;
  if (p.transposed) {
    for (int64_t n = 0; n < columns; n++) {
      Tile<kPairs>::load_row(w, p.dtype, column + n, q, depth, scratch->decoded + n * kTileUnits);
    }
    transpose(scratch->decoded, kTileUnits, columns, units, scratch->panel, kTileColumns);
  } else {
    for (int64_t u = 0; u < units; u++) {
      Tile<kPairs>::load_unit(w, p.dtype, q + u * Tile<kPairs>::kUnit, column, columns,
                              scratch->panel + u * kTileColumns);
    }
  }
}

// The depth of equal tiles of at most `most`, a whole number of blocks: a last thin one would cost as much as a whole.
inline int64_t tile_depth(int64_t contraction, int64_t most) {
  constexpr int64_t kBlock = 2 * int4::kGroup;
  const int64_t tiles = (contraction + most - 1) / most;
  const int64_t depth = (contraction + tiles - 1) / tiles;
  return (depth + kBlock - 1) / kBlock * kBlock;
}

template <bool kPairs>
void product_of(const Product& p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                Scratch* scratch) {
  constexpr int64_t kDepth = kTileUnits * Tile<kPairs>::kUnit;
  const int64_t rows = row_end - row_begin;
  const Multiplying<kPairs> multiplying;
  for (int64_t column = column_begin; column < column_end; column += kTileColumns) {
    const int64_t columns = column_end - column < kTileColumns ? column_end - column : kTileColumns;
    const int vectors = (columns + kLanes - 1) / kLanes;
    bool first = true;
    for (int t = 0; t < p.terms; t++) {
      const Weight& w = p.w[t];
      const int64_t contraction = p.transposed ? w.columns : w.rows;
      if (t == 0 && p.int8.codes) {
        const int64_t step = tile_depth(contraction, kTileUnits * kInt8Unit);
        for (int64_t q = 0; q < contraction; q += step, first = false) {
          const int64_t depth = contraction - q < step ? contraction - q : step;
          multiply_int8(w, p.int8, row_begin, rows, q, depth, column, columns, scratch->decoded, scratch->panel,
                        scratch->scales, scratch->sums, first);
        }
        continue;
      }
      const int64_t step = tile_depth(contraction, kDepth);
      for (int64_t q = 0; q < contraction; q += step, first = false) {
        const int64_t depth = contraction - q < step ? contraction - q : step;
        fill_panel<kPairs>(p, w, q, depth, column, columns, scratch);
        const Units x = {p.x[t].data + row_begin * p.x[t].stride + q / Tile<kPairs>::kUnit, p.x[t].stride};
        multiply_tile<kPairs>(vectors, rows, x, scratch->panel, (depth + Tile<kPairs>::kUnit - 1) / Tile<kPairs>::kUnit,
                              scratch->sums, first);
      }
    }
    if (first) __builtin_memset(scratch->sums, 0, rows * kTileColumns * sizeof(float));  // of no terms
    for (int64_t r = 0; r < rows; r++) {
      store_columns(p, row_begin + r, column, columns, scratch->sums + r * kTileColumns);
    }
  }
}

}  // namespace
