// Which of the level's products multiplies what.
#pragma once

#include "product.h"
#include "product_amx.h"
#include "units.h"

namespace {

using namespace entrenar;

#if defined(__AMX_BF16__)

constexpr int64_t kRowsToSplit = 512, kRowStep = amx::kTall, kColumnsAtOnce = amx::kStrip;

void product(const Product* p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
             void* scratch) {
  // int8 has its scales in the way of the matrix registers: a sum has to leave them after every block.
  if (p->dtype == kBFloat16 && !p->int8.codes) {
    amx::product(*p, row_begin, row_end, column_begin, column_end, (amx::Scratch*)scratch);
  } else if (p->dtype == kBFloat16) {
    product_of<true>(*p, row_begin, row_end, column_begin, column_end, (Scratch*)scratch);
  } else {
    product_of<false>(*p, row_begin, row_end, column_begin, column_end, (Scratch*)scratch);
  }
  _mm_sfence();  // what was streamed
}

int64_t product_scratch_bytes(int64_t rows) {
  return amx::scratch_bytes(rows) > scratch_bytes(rows) ? amx::scratch_bytes(rows) : scratch_bytes(rows);
}

// Whole registers; and rows that are a multiple of 4 KiB apart would share few sets of the caches.
int64_t units_stride(int64_t columns, bool pairs) {
  if (!pairs) return columns;
  const int64_t stride = (columns + 2 * amx::kUnits - 1) / (2 * amx::kUnits) * amx::kUnits;
  return stride % 1024 == 0 ? stride + amx::kUnits : stride;
}

// Rearranging a row of x takes about as long as transposing two rows of the weight, which it saves.
bool wants_tiles(int64_t rows, int64_t columns) { return 2 * rows <= columns; }

int64_t tiled_stride(int64_t columns) { return amx::row_units(columns); }

void to_tiles(const void* x, int64_t rows, int64_t columns, bool coded, int64_t row_begin, int64_t row_end,
              uint32_t* out) {
  amx::to_tiles((const uint16_t*)x, rows, columns, coded, row_begin, row_end, out);
}

#else

bool wants_tiles(int64_t, int64_t) { return false; }
constexpr int64_t (*tiled_stride)(int64_t) = nullptr;
constexpr void (*to_tiles)(const void*, int64_t, int64_t, bool, int64_t, int64_t, uint32_t*) = nullptr;

constexpr int64_t kRowsToSplit = 192, kRowStep = 12, kColumnsAtOnce = kTileColumns;

void product(const Product* p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
             void* scratch) {
#if defined(__AVX512BF16__)
  if (p->dtype == kBFloat16) {
    return product_of<true>(*p, row_begin, row_end, column_begin, column_end, (Scratch*)scratch);
  }
#endif
  product_of<false>(*p, row_begin, row_end, column_begin, column_end, (Scratch*)scratch);
}

int64_t product_scratch_bytes(int64_t rows) { return scratch_bytes(rows); }

int64_t units_stride(int64_t columns, bool pairs) { return pairs ? (columns + 1) / 2 : columns; }

#endif

}  // namespace
