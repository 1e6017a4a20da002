// What an instruction set level offers. Plain C types only: a level's translation unit is compiled with instructions
// that the machine may lack, and an inline function of another header emitted there could become everyone's copy.
#pragma once

#include <stdint.h>

#include "../../weight.h"

namespace entrenar {

// A row-major matrix in the 32-bit units that the product kernel consumes: float32 elements, or pairs of bfloat16.
struct Units {
  const uint32_t* data;
  int64_t stride;
};

// y = scale * sum over terms of x_t op(w_t) + bias, where op transposes (y = x wᵀ) or not (y = x w).
constexpr int kMaxTerms = 2;
struct Product {
  Dtype dtype;  // of x and y: weights are rounded to it, sums are float32
  bool transposed;
  int terms;
  Units x[kMaxTerms];
  Weight w[kMaxTerms];
  float scale;
  const float* bias;
  void* y;
  int64_t rows, columns;
};

struct Kernels {
  bool bfloat16_units;  // whether bfloat16 is multiplied in pairs; otherwise as float32

  // Codes and scales of `rows` rows of a matrix; a block that is not finite gets zero codes and a non-finite scale.
  void (*quantize)(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                   uint8_t* codes, void* scales);
  void (*dequantize)(const Weight* weight, int64_t row_begin, int64_t row_end, Dtype dtype, void* out);

  // Rows of x as units, the last unit of a row padded with zero.
  void (*to_units)(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool bfloat16_units, uint32_t* out,
                   int64_t stride);

  // The part of y in rows [row_begin, row_end) and columns [column_begin, column_end), column_begin a multiple of 64.
  void (*product)(const Product* p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                  void* scratch);
  int64_t (*product_scratch_bytes)(int64_t rows);

  // The same for at most `max_dot_rows` rows and op = transpose, straight from the codes, whose values are not rounded.
  // Here x is groups of 32 elements as pack_rows leaves them: as pairs for codes where the level multiplies those.
  void (*dot)(const Product* p, int64_t column_begin, int64_t column_end);
  int64_t max_dot_rows;
  void (*pack_rows)(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool pairs, int64_t group_begin,
                    int64_t group_end, uint32_t* out);

  // out[i, c] = sum over m of a[m, i] b[m, c], for c in [column_begin, column_end); out has `columns` columns.
  void (*outer)(const float* a, int64_t rank, const void* b, Dtype dtype, int64_t rows, int64_t columns,
                int64_t column_begin, int64_t column_end, float* out);
};

constexpr int64_t kTileColumns = 64;
constexpr int64_t kDotColumns = 16;  // that a dot makes at once

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace entrenar
