// Launchers of products in bfloat16 with one narrow side: an adapter's rank. They are bound by reading the wide side,
// once, and several are one launch. Sums are in float32, in an order that depends on the sizes of a call.
#pragma once

#include <stdint.h>

namespace entrenar {

// A factor in float32, [rank, columns], or [columns, rank] where it is `transposed`; out is [rank, columns].
struct Factor {
  const float* from;
  int64_t rank, columns;
  bool transposed;
  uint16_t* out;
};

// Rounds factors to bfloat16.
int skinny_round_cuda(const Factor* factors, int64_t count, void* stream);

// out[row, r] = scale * sum over c of x[row, c] factor[r, c], in rows of out_stride elements.
struct Projection {
  const uint16_t* x;
  int64_t columns;
  const uint16_t* factor;
  int64_t rank;
  uint16_t* out;
  int64_t out_stride;
};
int skinny_project_cuda(const Projection* projections, int64_t count, int64_t rows, float scale, void* stream);

// out[r, c] = sum over rows of narrow[row, r] x[row, c], in float32: [rank, columns], or [columns, rank] where it is
// `transposed`. Rows of narrow have narrow_stride elements.
struct OuterProduct {
  const uint16_t* x;
  int64_t columns;
  const uint16_t* narrow;
  int64_t narrow_stride, rank;
  bool transposed;
  float* out;
};

// `parts` holds skinny_outer_parts times the elements of all results, where that is not 1.
int64_t skinny_outer_parts(const OuterProduct* products, int64_t count, int64_t rows);
int skinny_outer_cuda(const OuterProduct* products, int64_t count, int64_t rows, float* parts, void* stream);

}  // namespace entrenar
