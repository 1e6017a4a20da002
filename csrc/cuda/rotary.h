// Launcher of the rotary embedding's kernel. Plain C types; returns a CUDA error.
#pragma once

#include "../pointwise.h"

namespace entrenar {

int rotary_cuda(const Rotary& r, void* stream);

}  // namespace entrenar
