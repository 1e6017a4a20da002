// rotary_embedding on CUDA.
#include "rotary.h"

#include <torch/csrc/stable/library.h>

#include "../rotary.h"
#include "device.h"

namespace entrenar {

namespace {

Tensor rotary_embedding(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transposed) {
  const OnDevice device(x);
  return rotary_embedding_op(x, cos, sin, transposed,
                             [&](const Rotary& r) { device.check(rotary_cuda(r, device.stream())); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) { m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding)); }

}  // namespace entrenar
