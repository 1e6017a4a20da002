// Gradients of activation functions, SwiGLU and its gradients, on CUDA.
#include "activation.h"

#include <torch/csrc/stable/library.h>

#include "../activation.h"
#include "device.h"

namespace entrenar {

namespace {

template <Binary f>
Tensor binary(const Tensor& a, const Tensor& b) {
  const OnDevice device(a);
  return binary_op(a, b, [&](Dtype dtype, int64_t size, const void* as, const void* bs, void* out) {
    device.check(binary_cuda(f, dtype, size, as, bs, out, device.stream()));
  });
}

template <bool kLog>
Tensor softmax_backward(const Tensor& dy, const Tensor& y) {
  const OnDevice device(dy);
  return softmax_backward_op(
      dy, y, [&](Dtype dtype, int64_t rows, int64_t columns, const void* from, const void* ys, void* dx) {
        device.check(softmax_backward_cuda(kLog, dtype, rows, columns, from, ys, dx, device.stream()));
      });
}

}  // namespace

Tensor swiglu(const Tensor& gate, const Tensor& up) { return binary<kSwiGLU>(gate, up); }

std::tuple<Tensor, Tensor> swiglu_backward_and(void* y, const Tensor& dy, const Tensor& gate, const Tensor& up) {
  const OnDevice device(dy);
  return swiglu_backward_op(
      dy, gate, up, y,
      [&](Dtype dtype, int64_t size, const void* from, const void* g, const void* u, void* dgate, void* dup, void* to) {
        device.check(swiglu_backward_cuda(dtype, size, from, g, u, dgate, dup, to, device.stream()));
      });
}

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
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
