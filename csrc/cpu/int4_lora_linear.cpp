// int4_lora_linear, int4_lora_linears and swiglu_int4_lora_linear on the CPU.
#include "../int4_lora_linear.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "product.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

std::vector<Layer> prepared(const Tensor&, const std::vector<Layer>& given, bool) { return given; }

Weight A_of(const Layer& layer) { return dense_weight(layer.A, layer.rank, layer.w.columns, "lora_A"); }
Weight B_of(const Layer& layer) { return dense_weight(layer.B, layer.w.rows, layer.rank, "lora_B"); }

// Columns that belong to the ranks of each layer.
Tensors split_ranks(Tensor all, const std::vector<Layer>& layers) {
  Tensors parts;
  int64_t begin = 0;
  for (const Layer& layer : layers) {
    parts.push_back(torch::stable::clone(torch::stable::narrow(all, -1, begin, layer.rank)));
    begin += layer.rank;
  }
  return parts;
}

Tensors project_down(const Tensor& x, const std::vector<Layer>& layers, double scaling) {
  const auto scale = static_cast<float>(scaling);
  if (layers.size() == 1) {
    Tensor u = empty_with_last(x, layers[0].rank);
    const Term term = {x, A_of(layers[0])};
    multiply(&term, 1, true, scale, std::nullopt, u);
    return {u};
  }
  const int64_t ranks = ranks_of(layers);
  Tensor stacked = torch::stable::new_empty(layers[0].A, {ranks, x.size(-1)});
  auto* to = stacked.mutable_data_ptr<float>();
  for (const Layer& layer : layers) {
    std::memcpy(to, layer.A.const_data_ptr(), layer.A.numel() * sizeof(float));
    to += layer.A.numel();
  }
  Tensor all = empty_with_last(x, ranks);
  const Term term = {x, dense_weight(stacked, ranks, x.size(-1), "lora_A")};
  multiply(&term, 1, true, scale, std::nullopt, all);
  return split_ranks(all, layers);
}

Tensors project_up(const Tensor& x, const Tensors& us, const std::vector<Layer>& layers, const Biases& biases,
                   bool int8) {
  Tensors ys;
  const std::optional<Int8Rows> rounded = int8 ? rounded_to_int8(x, layers[0].w) : std::nullopt;
  for (size_t i = 0; i < layers.size(); i++) {
    Tensor y = empty_with_last(x, layers[i].w.rows);
    const Term terms[] = {{x, layers[i].w}, {us[i], B_of(layers[i])}};
    multiply(terms, 2, true, 1.0f, biases[i], y, rounded);
    ys.push_back(y);
  }
  return ys;
}

Tensor sum_back(const Tensor& x, const Tensors& dys, const Tensors& dus, const std::vector<Layer>& layers) {
  std::vector<Term> terms;
  for (size_t i = 0; i < layers.size(); i++) {
    if (!dys.empty()) terms.push_back({dys[i], layers[i].w});
    if (!dus.empty()) terms.push_back({dus[i], A_of(layers[i])});
  }
  Tensor sum = empty_as(x);
  multiply(terms.data(), static_cast<int>(terms.size()), false, 1.0f, std::nullopt, sum);
  return sum;
}

// narrowᵀ wide in float32 [rank, columns], or its transpose.
Tensor outer(const Tensor& narrow, const Tensor& wide, bool transposed) {
  static thread_local Workspace workspace;
  const int64_t rows = rows_of(narrow), rank = narrow.size(-1), columns = wide.size(-1);
  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(wide, "x");
  auto* packed = static_cast<uint32_t*>(workspace.reserve((rows + 16) * rank * sizeof(uint32_t)));
  k.pack_outer(narrow.const_data_ptr(), dtype, rows, rank, packed);
  Tensor out = torch::stable::new_empty(wide, {transposed ? columns : rank, transposed ? rank : columns},
                                        ScalarType::Float);
  const void* from = wide.const_data_ptr();
  auto* to = out.mutable_data_ptr<float>();
  constexpr int64_t kColumns = 32;  // one cache line of bfloat16
  parallel_for(0, (columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    k.outer(packed, rank, from, dtype, rows, columns, begin * kColumns, std::min(columns, end * kColumns), transposed,
            to);
  });
  return out;
}

Tensors project_back(const Tensors& dys, const std::vector<Layer>& layers, double scaling) {
  Tensors dus;
  for (size_t i = 0; i < layers.size(); i++) {
    dus.push_back(empty_with_last(dys[i], layers[i].rank));
    const Term term = {dys[i], B_of(layers[i])};
    multiply(&term, 1, false, static_cast<float>(scaling), std::nullopt, dus.back());
  }
  return dus;
}

AdapterGradients outer_products(const Tensor& x, const Tensors& dys, const Tensors& us, const Tensors& dus,
                                const std::vector<Layer>& layers) {
  AdapterGradients found;
  for (size_t i = 0; i < layers.size(); i++) {
    found.dB.push_back(outer(us[i], dys[i], true));
    found.dA.push_back(outer(dus[i], x, false));
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("int4_lora_linear", TORCH_BOX(&int4_lora_linear));
  m.impl("int4_lora_linear_backward", TORCH_BOX(&int4_lora_linear_backward));
  m.impl("int4_lora_linears", TORCH_BOX(&int4_lora_linears));
  m.impl("int4_lora_linears_backward", TORCH_BOX(&int4_lora_linears_backward));
  m.impl("swiglu_int4_lora_linear", TORCH_BOX(&swiglu_int4_lora_linear));
  m.impl("swiglu_int4_lora_linear_backward", TORCH_BOX(&swiglu_int4_lora_linear_backward));
}

}  // namespace entrenar
