// What is computed of elements and of rows, on every device. Plain C types only.
#pragma once

#include <stdint.h>

#include "weight.h"

namespace entrenar {

// What is computed of two arrays, element by element.
enum Binary { kSiluBackward, kGeluBackward, kGeluTanhBackward, kSigmoidBackward, kTanhBackward, kSwiGLU };

// y = x̂ w with x̂ = s / sqrt(mean(s²) + eps) for each row s of x, or of x + residual, which is then kept in sum.
struct RMSNorm {
  Dtype dtype;
  int64_t rows, columns;
  float eps;
  const void *x, *residual, *weight;  // residual and weight may be null
  void *sum, *y;
};

// The gradient through a normalization of rows, from dy and its input x; dsum, if not null, is added to dx. The sums
// over rows, dw and db, are null where not wanted.
struct NormBackward {
  Dtype dtype;
  int64_t rows, columns;
  float eps;
  const void *dy, *x, *weight, *dsum;
  void *dx, *dw, *db;
};

// y = x cos + R x sin, or its transpose, for rows of d elements along three other dimensions, the last the innermost.
struct Rotary {
  enum { kX, kCos, kSin, kY, kTensors };
  Dtype dtype;
  bool transposed;
  int64_t rows, half;  // d / 2
  int64_t sizes[3], strides[kTensors][3];
  const void *x, *cos, *sin;
  void* y;
};

// For each row of logits the loss and its gradient times a scale (1 without scales), each where it is wanted.
struct CrossEntropy {
  Dtype dtype;  // of logits and gradient
  const void* logits;
  int64_t rows, classes;
  const int64_t* targets;
  int64_t ignore_index;
  const float* scales;
  void* gradient;  // may be the logits
  float* losses;
};

}  // namespace entrenar
