// rotary_embedding on the CPU.
#include "../rotary.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dispatch.h"

namespace entrenar {

namespace {

Tensor rotary_embedding(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  return rotary_embedding_op(x, cos, sin, transposed, [](const Rotary& r) {
    const Kernels& k = kernels();
    torch::stable::parallel_for(0, r.rows, std::max<int64_t>(1, kElementsToSplit / std::max<int64_t>(1, 2 * r.half)),
                                [&](int64_t begin, int64_t end) { k.rotary(&r, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) { m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding)); }

}  // namespace entrenar
