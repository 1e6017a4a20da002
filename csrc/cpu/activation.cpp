// Gradients of activation functions, SwiGLU and its gradients, on the CPU.
#include "../activation.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dispatch.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

template <Binary f>
Tensor binary(const Tensor& a, const Tensor& b) {
  return binary_op(a, b, [](Dtype dtype, int64_t size, const void* as, const void* bs, void* out) {
    const Kernels& k = kernels();
    parallel_for(0, size, kElementsToSplit,
                 [&](int64_t begin, int64_t end) { k.binary(f, dtype, begin, end, as, bs, out); });
  });
}

template <bool kLog>
Tensor softmax_backward(const Tensor& dy, const Tensor& y) {
  return softmax_backward_op(
      dy, y, [](Dtype dtype, int64_t rows, int64_t columns, const void* from, const void* ys, void* dx) {
        const Kernels& k = kernels();
        parallel_for(0, rows, std::max<int64_t>(1, kElementsToSplit / std::max<int64_t>(1, columns)),
                     [&](int64_t begin, int64_t end) {
                       k.softmax_backward(kLog, dtype, columns, begin, end, from, ys, dx);
                     });
      });
}

}  // namespace

Tensor swiglu(const Tensor& gate, const Tensor& up) { return binary<kSwiGLU>(gate, up); }

std::tuple<Tensor, Tensor> swiglu_backward_and(void* y, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  return swiglu_backward_op(
      dy, gate, up, y,
      [](Dtype dtype, int64_t size, const void* from, const void* g, const void* u, void* dgate, void* dup, void* to) {
        const Kernels& k = kernels();
        parallel_for(0, size, kElementsToSplit, [&](int64_t begin, int64_t end) {
          k.swiglu_backward(dtype, begin, end, from, g, u, dgate, dup, to);
        });
      });
}

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("silu_backward", TORCH_BOX(&binary<kSiluBackward>));
  m.impl("gelu_backward", TORCH_BOX(&binary<kGeluBackward>));
  m.impl("gelu_tanh_backward", TORCH_BOX(&binary<kGeluTanhBackward>));
  m.impl("sigmoid_backward", TORCH_BOX(&binary<kSigmoidBackward>));
  m.impl("tanh_backward", TORCH_BOX(&binary<kTanhBackward>));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward<false>));
  m.impl("log_softmax_backward", TORCH_BOX(&softmax_backward<true>));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace entrenar
