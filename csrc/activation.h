// Gradients of activation functions from dy and what their forward kept, SwiGLU and its gradients: what is checked and
// allocated. Each device computes them by the function that it passes.
#pragma once

#include <tuple>

#include "arguments.h"
#include "pointwise.h"

namespace entrenar {

// compute(dtype, size, a, b, out)
template <class Compute>
Tensor binary_op(const Tensor& a, const Tensor& b, const Compute& compute) {
  const Dtype dtype = float_dtype_of(a, "the first argument");
  check_like(b, "the second argument", a);
  const Tensor first = packed(a), second = packed(b);
  const Tensor out = empty_as(first);
  compute(dtype, first.numel(), first.const_data_ptr(), second.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

// compute(dtype, size, dy, gate, up, dgate, dup, y); y, if not null, is where the forward's result goes, and may be dy.
template <class Compute>
std::tuple<Tensor, Tensor> swiglu_backward_op(const Tensor& dy, const Tensor& gate, const Tensor& up, void* y,
                                              const Compute& compute) {
  const Dtype dtype = float_dtype_of(dy, "dy");
  check_like(gate, "gate", dy);
  check_like(up, "up", dy);
  const Tensor gradient = packed(dy), gates = packed(gate), ups = packed(up);
  const Tensor dgate = empty_as(gates), dup = empty_as(ups);
  compute(dtype, gradient.numel(), gradient.const_data_ptr(), gates.const_data_ptr(), ups.const_data_ptr(),
          dgate.mutable_data_ptr(), dup.mutable_data_ptr(), y);
  return {dgate, dup};
}

// Which each device defines, for ops that begin with SwiGLU too: y = silu(gate) up, and its gradients from dy, with y as
// above.
Tensor swiglu(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> swiglu_backward_and(void* y, const Tensor& dy, const Tensor& gate, const Tensor& up);

inline std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  return swiglu_backward_and(nullptr, dy, gate, up);
}

// compute(dtype, rows, columns, dy, y, dx)
template <class Compute>
Tensor softmax_backward_op(const Tensor& dy, const Tensor& y, const Compute& compute) {
  STD_TORCH_CHECK(dy.dim() > 0, "dy must have at least one dimension");
  const Dtype dtype = float_dtype_of(dy, "dy");
  check_like(y, "y", dy);
  const Tensor gradient = packed(dy), result = packed(y);
  const Tensor dx = empty_as(gradient);
  const int64_t columns = dy.size(-1), rows = columns ? dy.numel() / columns : 0;
  compute(dtype, rows, columns, gradient.const_data_ptr(), result.const_data_ptr(), dx.mutable_data_ptr());
  return dx;
}

}  // namespace entrenar
