// Which level's kernels run.
#pragma once

#include "level/kernels.h"

namespace entrenar {

const Kernels& kernels();

}  // namespace entrenar
