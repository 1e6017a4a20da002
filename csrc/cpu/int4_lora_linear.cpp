// int4_lora_linear: y = x Wᵀ + b + u Bᵀ with u = scaling x Aᵀ, and its gradients: with du = scaling dy B,
// dx = dy W + du A, dA = duᵀ x, dB = dyᵀ u.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "dispatch.h"
#include "product.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

std::tuple<Tensor, Tensor> int4_lora_linear(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                            std::optional<Tensor> bias, const Tensor& lora_A, const Tensor& lora_B,
                                            double scaling, int64_t block) {
  STD_TORCH_CHECK(x.dim() > 0 && lora_A.dim() == 2, "x must have at least one dimension, and lora_A two");
  const Tensor input = torch::stable::contiguous(x);
  const Tensor A = torch::stable::contiguous(lora_A), B = torch::stable::contiguous(lora_B);
  const Weight w = int4_weight(codes, scales, x.size(-1), block);
  const int64_t rank = A.size(0);

  Tensor u = empty_with_last(input, rank);
  const Term down = {input, dense_weight(A, rank, w.columns, "lora_A")};
  multiply(&down, 1, true, static_cast<float>(scaling), std::nullopt, u);

  Tensor y = empty_with_last(input, w.rows);
  const Term terms[] = {{input, w}, {u, dense_weight(B, w.rows, rank, "lora_B")}};
  multiply(terms, 2, true, 1.0f, bias, y);
  return {y, u};
}

// narrow [rows, rank] transposed times wide [rows, columns], into float32 [rank, columns].
void outer(const Tensor& narrow, const Tensor& wide, Tensor& out) {
  static thread_local Workspace workspace;
  const int64_t rows = rows_of(narrow), rank = narrow.size(-1), columns = wide.size(-1);
  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(wide, "x");
  auto* factors = static_cast<float*>(workspace.reserve(rows * rank * sizeof(float)));
  k.to_units(narrow.const_data_ptr(), dtype, rows, rank, false, reinterpret_cast<uint32_t*>(factors), rank);
  const void* from = wide.const_data_ptr();
  auto* to = out.mutable_data_ptr<float>();
  constexpr int64_t kColumns = 32;  // one cache line of bfloat16
  parallel_for(0, (columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    k.outer(factors, rank, from, dtype, rows, columns, begin * kColumns, std::min(columns, end * kColumns), to);
  });
}

std::tuple<Tensor, Tensor, Tensor> int4_lora_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& codes,
                                                             const Tensor& scales, const Tensor& lora_A,
                                                             const Tensor& lora_B, const Tensor& u, double scaling,
                                                             int64_t block, bool needs_dx) {
  STD_TORCH_CHECK(x.dim() > 0 && lora_A.dim() == 2, "x must have at least one dimension, and lora_A two");
  STD_TORCH_CHECK(dtype_of(dy, "dy") == dtype_of(x, "x") && dtype_of(u, "u") == dtype_of(x, "x"),
                  "dy, u and x must have the same dtype");
  const Tensor input = torch::stable::contiguous(x), gradient = torch::stable::contiguous(dy);
  const Tensor A = torch::stable::contiguous(lora_A), B = torch::stable::contiguous(lora_B);
  const Tensor down = torch::stable::contiguous(u);
  const Weight w = int4_weight(codes, scales, x.size(-1), block);
  const int64_t rank = A.size(0), rows = rows_of(x);
  const Weight a = dense_weight(A, rank, w.columns, "lora_A"), b = dense_weight(B, w.rows, rank, "lora_B");
  STD_TORCH_CHECK(gradient.numel() == rows * w.rows && down.numel() == rows * rank,
                  "dy must be [..., N] and u [..., r], with the rows of x");

  Tensor du = empty_with_last(gradient, rank);
  const Term up = {gradient, b};
  multiply(&up, 1, false, static_cast<float>(scaling), std::nullopt, du);

  Tensor dx = needs_dx ? empty_with_last(input, w.columns) : torch::stable::new_empty(x, {0});
  if (needs_dx) {
    const Term terms[] = {{gradient, w}, {du, a}};
    multiply(terms, 2, false, 1.0f, std::nullopt, dx);
  }

  Tensor dA = torch::stable::new_empty(A, {rank, w.columns});
  outer(du, input, dA);
  Tensor dB = torch::stable::new_empty(A, {rank, w.rows});
  outer(down, gradient, dB);
  return {dx, dA, torch::stable::contiguous(torch::stable::transpose(dB, 0, 1))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("int4_lora_linear", TORCH_BOX(&int4_lora_linear));
  m.impl("int4_lora_linear_backward", TORCH_BOX(&int4_lora_linear_backward));
}

}  // namespace entrenar
