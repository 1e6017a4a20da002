// The targets of a cross-entropy, checked before kernels go by them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace entrenar {

inline void check_targets(const int64_t* targets, int64_t rows, int64_t classes, int64_t ignore_index) {
  for (int64_t row = 0; row < rows; row++) {
    STD_TORCH_CHECK(targets[row] == ignore_index || (targets[row] >= 0 && targets[row] < classes), "Target ",
                    targets[row], " is out of bounds: row ", row, " has ", classes, " classes");
  }
}

}  // namespace entrenar
