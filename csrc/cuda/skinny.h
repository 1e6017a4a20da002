// Launchers of products in bfloat16 with one narrow side: an adapter's rank. They are bound by reading the wide side,
// once. Sums are in float32, in an order that depends on the sizes alone, and for each element not on the rank.
#pragma once

#include <stdint.h>

namespace entrenar {

// out[r, c] = from[r * row_stride + c * column_stride], rounded: [rank, columns] in bfloat16.
int skinny_factor_cuda(const float* from, int64_t rank, int64_t columns, int64_t row_stride, int64_t column_stride,
                       uint16_t* out, void* stream);

// out[row, r] = scale * sum over c of x[row, c] factor[r, c]
int skinny_project_cuda(const uint16_t* x, const uint16_t* factor, int64_t rows, int64_t columns, int64_t rank,
                        float scale, uint16_t* out, void* stream);

// out[r, c] = sum over rows of narrow[row, r] wide[row, c], in float32 and with the given strides, which make `out`
// [rank, columns] or [columns, rank]. `parts` holds skinny_outer_parts times the elements of `out` where that is not 1.
int64_t skinny_outer_parts(int64_t rows, int64_t columns);
int skinny_outer_cuda(const uint16_t* narrow, const uint16_t* wide, int64_t rows, int64_t rank, int64_t columns,
                      bool transposed, float* parts, float* out, void* stream);

}  // namespace entrenar
