// Which level's kernels run.
#pragma once

#include <stdint.h>

#include "level/kernels.h"

namespace entrenar {

constexpr int64_t kElementsToSplit = 1 << 15;  // fewer than these stay on one thread

const Kernels& kernels();

}  // namespace entrenar
