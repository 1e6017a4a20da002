// Launcher of the cross-entropy's kernel. Plain C types; returns a CUDA error.
#pragma once

#include "../pointwise.h"

namespace entrenar {

int cross_entropy_cuda(const CrossEntropy& p, void* stream);

}  // namespace entrenar
