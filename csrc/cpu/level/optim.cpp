// The optimizers' kernels of one level, compiled once for each instruction set.
#include "optim.h"

#include "optim_entry.h"

namespace entrenar {

void LEVELED(optim)(const OptimCall* call, const OptimStep* step, const OptimTensor* tensor, int64_t begin, int64_t end) {
  optim(call, step, tensor, begin, end);
}

float LEVELED(square_sum)(Dtype dtype, const void* data, int64_t begin, int64_t end) {
  return square_sum(dtype, data, begin, end);
}

}  // namespace entrenar
