// What the kernel of linear_cross_entropy is given. Plain C types only.
#pragma once

#include <stdint.h>

#include "../../weight.h"

namespace entrenar {

// Contiguous matrices: x [rows, columns] and weight [classes, columns] of one dtype.
struct LinearCrossEntropy {
  Dtype dtype;
  int64_t columns, classes;
  const void *x, *weight;
  const int64_t* targets;
  int64_t ignore_index;
  float* losses;
  void* dx;  // of the sum of the losses, or null where it is not wanted
};

}  // namespace entrenar
