// The launcher of an AdamW step.
#pragma once

#include "../adamw.h"

namespace entrenar {

int adamw_cuda(const AdamWStep& step, Dtype dtype, const AdamWTensor* tensors, int64_t count, void* stream);

}  // namespace entrenar
