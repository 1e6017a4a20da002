// The optimizers' kernels of a level, which are a translation unit of their own.
#pragma once

#include "kernels.h"

#define LEVELED_NAME(name, level) name##_##level
#define LEVELED_WITH(name, level) LEVELED_NAME(name, level)
#define LEVELED(name) LEVELED_WITH(name, LEVEL)

namespace entrenar {

void LEVELED(optim)(const OptimCall* call, const OptimStep* step, const OptimTensor* tensor, int64_t begin, int64_t end);
float LEVELED(square_sum)(Dtype dtype, const void* data, int64_t begin, int64_t end);

}  // namespace entrenar
