// What an instruction set level offers. Plain C types only: a level's translation unit is compiled with instructions
// that the machine may lack, and an inline function of another header emitted there could become everyone's copy.
#pragma once

#include <stdint.h>

#include "../../optim.h"
#include "../../pointwise.h"
#include "../../weight.h"
#include "attention_block.h"
#include "linear_cross_entropy_block.h"

namespace entrenar {

// A row-major matrix in the 32-bit units that the product kernel consumes: float32 elements, or pairs of bfloat16.
struct Units {
  const uint32_t* data;
  int64_t stride;
};

// A matrix rounded to int8 by blocks of its rows, with a float32 scale for each.
struct Int8Rows {
  uint8_t* codes;  // plus 128; rows of `stride` bytes, zeros past their end
  float* scales;
  int64_t stride, blocks;
};

// y = scale * sum over terms of x_t op(w_t) + bias, where op transposes (y = x wᵀ) or not (y = x w).
constexpr int kMaxTerms = 16;  // eight layers with an adapter each
struct Product {
  // No contraction is empty; there may be no term.
  Dtype dtype;  // of x and y: weights are rounded to it, sums are float32
  bool transposed;
  int terms;
  bool tiles;  // whether x is that instead
  Units x[kMaxTerms];
  Weight w[kMaxTerms];
  Int8Rows int8;  // stands for x[0] where it has codes, in a transposed product with an int4 w[0]
  float scale;
  const float* bias;
  void* y;
  bool far;  // y is too large to be read again from a cache
  int64_t rows, columns;
};

struct Kernels {
  bool bfloat16_units;  // whether bfloat16 is multiplied in pairs; otherwise as float32

  // Codes and scales of `rows` rows of a matrix; a block that is not finite gets zero codes and a non-finite scale.
  void (*quantize)(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                   bool mse, uint8_t* codes, void* scales);
  void (*dequantize)(const Weight* weight, int64_t row_begin, int64_t row_end, Dtype dtype, void* out);

  // Rows of x as units, so many from one row to the next, with zeros past a row's end.
  int64_t (*units_stride)(int64_t columns, bool pairs);
  void (*to_units)(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool bfloat16_units, uint32_t* out,
                   int64_t stride);

  // Whether y = x wᵀ of bfloat16 wants x as tiles, for each of which w is decoded without a transposition; and rows
  // [row_begin, row_end) of x as such, for a w that is codes or not. row_begin is a multiple of 16, up to the next of
  // which so many words a row are written.
  bool (*wants_tiles)(int64_t rows, int64_t columns);
  int64_t (*tiled_stride)(int64_t columns);
  void (*to_tiles)(const void* x, int64_t rows, int64_t columns, bool coded, int64_t row_begin, int64_t row_end,
                   uint32_t* out);

  void (*to_int8)(const void* x, Dtype dtype, int64_t rows, int64_t columns, int block, const Int8Rows* out);

  // The part of y in rows [row_begin, row_end) and columns [column_begin, column_end), column_begin a multiple of 64.
  void (*product)(const Product* p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                  void* scratch);
  int64_t (*product_scratch_bytes)(int64_t rows);
  int64_t rows_to_split;    // a weight is decoded anew for each part of the rows, which is little from this many on
  int64_t row_step;         // of a whole number of microkernels
  int64_t columns_at_once;  // in one call at most: fewer calls would leave less for threads to take from each other

  // The same for at most `max_dot_rows` rows and op = transpose, straight from the codes, whose values are not rounded.
  // Here x is groups of 32 elements as pack_rows leaves them: as pairs for codes where the level multiplies those.
  void (*dot)(const Product* p, int64_t column_begin, int64_t column_end);
  int64_t (*max_dot_rows)(Dtype dtype);
  bool dot_pairs;
  void (*pack_rows)(const void* x, Dtype dtype, int64_t rows, int64_t columns, bool pairs, int64_t group_begin,
                    int64_t group_end, uint32_t* out);

  // out[i, c] = sum over m of a[m, i] b[m, c], for c in [column_begin, column_end); out is [rank, columns], or that
  // transposed. a is packed first, into at most (rows + 16) rank 32-bit words.
  void (*pack_outer)(const void* a, Dtype dtype, int64_t rows, int64_t rank, uint32_t* packed);
  void (*outer)(const uint32_t* packed, int64_t rank, const void* b, Dtype dtype, int64_t rows, int64_t columns,
                int64_t column_begin, int64_t column_end, bool transposed, float* out);

  // Up to kAttentionBlock keys and values, packed into a tile of so many 32-bit words.
  int64_t (*attention_tile_words)(const AttentionKind* kind, bool backward);
  void (*attention_pack)(const AttentionKind* kind, bool backward, ConstRows k, ConstRows v, int64_t keys,
                         uint32_t* tile, void* scratch);
  int64_t (*attention_scratch_bytes)();
  void (*attention_forward)(const AttentionKind* kind, const AttentionBlock* block, const AttentionOutput* output,
                            void* scratch);
  // The same of a block of heads that have one query each and share k and v, which are taken as they are, with so many
  // floats for scratch. Nothing is causal.
  int64_t (*attention_single_floats)(int64_t keys);
  void (*attention_single)(const AttentionKind* kind, const AttentionBlock* block, ConstRows k, ConstRows v,
                           const AttentionOutput* output, float* scratch);
  void (*attention_backward)(const AttentionKind* kind, const AttentionBlock* block, const AttentionGradient* gradient,
                             void* scratch);

  // A tile of dk or dv: the sum of `count` parts, times `scale`.
  void (*attention_sum)(const float* parts, int64_t count, int64_t part_stride, float scale, Dtype dtype, int64_t keys,
                        int64_t columns, Rows out);
  void (*cross_entropy)(const CrossEntropy* p, int64_t row_begin, int64_t row_end);

  // Rows [row_begin, row_end), for which the classes are packed anew, in scratch memory for as many rows.
  void (*linear_cross_entropy)(const LinearCrossEntropy* p, int64_t row_begin, int64_t row_end, void* scratch);
  int64_t (*linear_cross_entropy_bytes)(const LinearCrossEntropy* p, int64_t rows);

  // Element by element; what is a gradient takes dy first. 16-bit values are rounded once, at the end. The y of swiglu
  // is written too if not null, and may be dy.
  void (*binary)(Binary f, Dtype dtype, int64_t begin, int64_t end, const void* a, const void* b, void* out);
  void (*swiglu_backward)(Dtype dtype, int64_t begin, int64_t end, const void* dy, const void* gate, const void* up,
                          void* dgate, void* dup, void* y);

  // Rows [row_begin, row_end). Sums over these rows go to dw and db, `sums_stride(columns)` floats, where not null.
  void (*rms_norm)(const RMSNorm* n, int64_t row_begin, int64_t row_end);
  void (*rms_norm_backward)(const NormBackward* n, int64_t row_begin, int64_t row_end, float* dw);
  void (*layer_norm_backward)(const NormBackward* n, int64_t row_begin, int64_t row_end, float* dw, float* db);
  // out[i] = the sum over chunks of sums[chunk * sums_stride(columns) + i], in their order.
  void (*add_sums)(const float* sums, int64_t chunks, int64_t columns, Dtype dtype, void* out);

  // From dy and the result y.
  void (*softmax_backward)(bool log, Dtype dtype, int64_t columns, int64_t row_begin, int64_t row_end, const void* dy,
                           const void* y, void* dx);
  void (*rotary)(const Rotary* r, int64_t row_begin, int64_t row_end);

  // Elements [begin, end) of a parameter; begin is a multiple of kCodeBlock.
  void (*optim)(const OptimCall* call, const OptimStep* step, const OptimTensor* tensor, int64_t begin, int64_t end);
  float (*square_sum)(Dtype dtype, const void* data, int64_t begin, int64_t end);
};

// Sums over rows are kept in whole vectors of every level.
constexpr int64_t sums_stride(int64_t columns) { return (columns + 15) / 16 * 16; }

constexpr int64_t kTileColumns = 64;
constexpr int64_t kDotColumns = 16;  // that a dot makes at once

extern const Kernels kernels_base;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;

}  // namespace entrenar
