// Which of the level's kernels makes an outer product.
#pragma once

#include "outer.h"
#include "outer_amx.h"

namespace {

using namespace entrenar;

void pack_outer(const void* a, Dtype dtype, int64_t rows, int64_t rank, uint32_t* packed) {
#if defined(__AMX_BF16__)
  if (dtype == kBFloat16) return amx::pack_outer((const uint16_t*)a, rows, rank, packed);
#endif
  (dtype == kFloat32 ? pack_outer_of<kFloat32> : pack_outer_of<kBFloat16>)(a, rows, rank, packed);
}

void outer(const uint32_t* packed, int64_t rank, const void* b, Dtype dtype, int64_t rows, int64_t columns,
           int64_t column_begin, int64_t column_end, bool transposed, float* out) {
  const OuterResult result = {out, transposed ? 1 : columns, transposed ? rank : 1};
#if defined(__AMX_BF16__)
  if (dtype == kBFloat16) {
    return amx::outer(packed, rank, (const uint16_t*)b, rows, columns, column_begin, column_end, result);
  }
#endif
  (dtype == kFloat32 ? outer_of<kFloat32> : outer_of<kBFloat16>)(packed, rank, b, rows, columns, column_begin,
                                                                 column_end, result);
}

}  // namespace
