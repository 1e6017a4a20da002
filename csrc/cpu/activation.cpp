// Gradients of activation functions from dy and what their forward kept; SwiGLU and its gradients.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "dispatch.h"
#include "../arguments.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

template <Binary f>
Tensor binary(const Tensor& a, const Tensor& b) {
  const Dtype dtype = float_dtype_of(a, "the first argument");
  check_like(b, "the second argument", a);
  const Tensor first = packed(a), second = packed(b);
  const Tensor out = empty_as(first);
  const Kernels& k = kernels();
  const void *as = first.const_data_ptr(), *bs = second.const_data_ptr();
  void* to = out.mutable_data_ptr();
  parallel_for(0, first.numel(), kElementsToSplit,
               [&](int64_t begin, int64_t end) { k.binary(f, dtype, begin, end, as, bs, to); });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  const Dtype dtype = float_dtype_of(dy, "dy");
  check_like(gate, "gate", dy);
  check_like(up, "up", dy);
  const Tensor gradient = packed(dy), gates = packed(gate), ups = packed(up);
  const Tensor dgate = empty_as(gates), dup = empty_as(ups);
  const Kernels& k = kernels();
  const void *from = gradient.const_data_ptr(), *g = gates.const_data_ptr(), *u = ups.const_data_ptr();
  void *dg = dgate.mutable_data_ptr(), *du = dup.mutable_data_ptr();
  parallel_for(0, gradient.numel(), kElementsToSplit,
               [&](int64_t begin, int64_t end) { k.swiglu_backward(dtype, begin, end, from, g, u, dg, du); });
  return {dgate, dup};
}

template <bool kLog>
Tensor softmax_backward(const Tensor& dy, const Tensor& y) {
  STD_TORCH_CHECK(dy.dim() > 0, "dy must have at least one dimension");
  const Dtype dtype = float_dtype_of(dy, "dy");
  check_like(y, "y", dy);
  const Tensor gradient = packed(dy), result = packed(y);
  const Tensor dx = empty_as(gradient);
  const int64_t columns = dy.size(-1), rows = columns ? dy.numel() / columns : 0;
  const Kernels& k = kernels();
  const void *from = gradient.const_data_ptr(), *ys = result.const_data_ptr();
  void* to = dx.mutable_data_ptr();
  parallel_for(0, rows, std::max<int64_t>(1, kElementsToSplit / std::max<int64_t>(1, columns)),
               [&](int64_t begin, int64_t end) {
                 k.softmax_backward(kLog, dtype, columns, begin, end, from, ys, to);
               });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("silu_backward", TORCH_BOX(&binary<kSiluBackward>));
  m.impl("gelu_backward", TORCH_BOX(&binary<kGeluBackward>));
  m.impl("gelu_tanh_backward", TORCH_BOX(&binary<kGeluTanhBackward>));
  m.impl("sigmoid_backward", TORCH_BOX(&binary<kSigmoidBackward>));
  m.impl("tanh_backward", TORCH_BOX(&binary<kTanhBackward>));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward<false>));
  m.impl("log_softmax_backward", TORCH_BOX(&softmax_backward<true>));
  m.impl("swiglu", TORCH_BOX(&binary<kSwiGLU>));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

}  // namespace entrenar
