// Launchers of products in bfloat16 with one narrow side: an adapter's rank. They are bound by reading the wide side,
// once. Sums are in float32, in an order that depends on the sizes alone, and for each element not on the rank.
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

struct Projection {
  const uint16_t* factor;
  int64_t rank;
  uint16_t* out;
};

// out[row, r] = scale * sum over c of x[row, c] factor[r, c], of each projection.
int skinny_project_cuda(const uint16_t* x, const Projection* projections, int64_t count, int64_t rows, int64_t columns,
                        float scale, void* stream);

// out[r, c] = sum over rows of narrow[row, r] wide[row, c], in float32: [rank, columns], or [columns, rank] where it is
// `transposed`. `parts` holds skinny_outer_parts times the elements of `out` where that is not 1.
int64_t skinny_outer_parts(int64_t rows, int64_t columns);
int skinny_outer_cuda(const uint16_t* narrow, const uint16_t* wide, int64_t rows, int64_t rank, int64_t columns,
                      bool transposed, float* parts, float* out, void* stream);

}  // namespace entrenar
