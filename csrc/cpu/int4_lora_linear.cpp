// int4_lora_linear: y = x Wᵀ + b + u Bᵀ with u = scaling x Aᵀ, and its gradients: with du = scaling dy B,
// dx = dy W + du A, dA = duᵀ x, dB = dyᵀ u. int4_lora_linears: several of them at one x, whose dx is one sum.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "product.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;
using Tensors = std::vector<Tensor>;

struct Layer {
  Weight w;
  Tensor A, B;  // contiguous
  int64_t rank;
};

Layer layer_of(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& lora_A, const Tensor& lora_B,
               int64_t block) {
  STD_TORCH_CHECK(x.dim() > 0 && lora_A.dim() == 2, "x must have at least one dimension, and lora_A two");
  Layer layer = {int4_weight(codes, scales, x.size(-1), block), torch::stable::contiguous(lora_A),
                 torch::stable::contiguous(lora_B), lora_A.size(0)};
  dense_weight(layer.B, layer.w.rows, layer.rank, "lora_B");
  dense_weight(layer.A, layer.rank, layer.w.columns, "lora_A");
  return layer;
}

std::vector<Layer> layers_of(const Tensor& x, const Tensors& codes, const Tensors& scales, const Tensors& lora_A,
                             const Tensors& lora_B, int64_t block) {
  const size_t count = codes.size();
  STD_TORCH_CHECK(count > 0 && scales.size() == count && lora_A.size() == count && lora_B.size() == count,
                  "codes, scales, lora_A and lora_B must be lists of one length, which is not 0");
  std::vector<Layer> layers;
  for (size_t i = 0; i < count; i++) {
    layers.push_back(layer_of(x, codes[i], scales[i], lora_A[i], lora_B[i], block));
  }
  return layers;
}

Weight A_of(const Layer& layer) { return dense_weight(layer.A, layer.rank, layer.w.columns, "lora_A"); }
Weight B_of(const Layer& layer) { return dense_weight(layer.B, layer.w.rows, layer.rank, "lora_B"); }

// u = scaling x Aᵀ of each layer, in one pass over x.
Tensors project_down(const Tensor& x, const std::vector<Layer>& layers, double scaling) {
  const auto scale = static_cast<float>(scaling);
  if (layers.size() == 1) {
    Tensor u = empty_with_last(x, layers[0].rank);
    const Term term = {x, A_of(layers[0])};
    multiply(&term, 1, true, scale, std::nullopt, u);
    return {u};
  }
  int64_t ranks = 0;
  for (const Layer& layer : layers) ranks += layer.rank;
  Tensor stacked = torch::stable::new_empty(layers[0].A, {ranks, x.size(-1)});
  auto* to = stacked.mutable_data_ptr<float>();
  for (const Layer& layer : layers) {
    std::memcpy(to, layer.A.const_data_ptr(), layer.A.numel() * sizeof(float));
    to += layer.A.numel();
  }
  Tensor all = empty_with_last(x, ranks);
  const Term term = {x, dense_weight(stacked, ranks, x.size(-1), "lora_A")};
  multiply(&term, 1, true, scale, std::nullopt, all);

  Tensors us;
  int64_t begin = 0;
  for (const Layer& layer : layers) {
    us.push_back(torch::stable::clone(torch::stable::narrow(all, -1, begin, layer.rank)));
    begin += layer.rank;
  }
  return us;
}

std::tuple<Tensors, Tensors> forward(const Tensor& x, const Tensor& lora_x, const std::vector<Layer>& layers,
                                     std::optional<Tensor> bias, double scaling, bool int8) {
  const Tensor input = torch::stable::contiguous(x);
  Tensors us = project_down(torch::stable::contiguous(lora_x), layers, scaling), ys;
  int64_t begin = 0;
  for (size_t i = 0; i < layers.size(); i++) {
    const int64_t columns = layers[i].w.rows;
    std::optional<Tensor> own;
    if (bias) own = layers.size() == 1 ? *bias : torch::stable::narrow(*bias, 0, begin, columns);
    Tensor y = empty_with_last(input, columns);
    const Term terms[] = {{input, layers[i].w}, {us[i], B_of(layers[i])}};
    multiply(terms, 2, true, 1.0f, own, y, int8);
    ys.push_back(y);
    begin += columns;
  }
  return {ys, us};
}

// narrow [rows, rank] transposed times wide [rows, columns], into float32 [rank, columns].
void outer(const Tensor& narrow, const Tensor& wide, Tensor& out) {
  static thread_local Workspace workspace;
  const int64_t rows = rows_of(narrow), rank = narrow.size(-1), columns = wide.size(-1);
  const Kernels& k = kernels();
  const Dtype dtype = dtype_of(wide, "x");
  auto* packed = static_cast<uint32_t*>(workspace.reserve(rows * rank * sizeof(uint32_t)));
  k.pack_outer(narrow.const_data_ptr(), dtype, rows, rank, packed);
  const void* from = wide.const_data_ptr();
  auto* to = out.mutable_data_ptr<float>();
  constexpr int64_t kColumns = 32;  // one cache line of bfloat16
  parallel_for(0, (columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    k.outer(packed, rank, from, dtype, rows, columns, begin * kColumns, std::min(columns, end * kColumns), to);
  });
}

struct Gradients {
  Tensor dx, d_lora_x;
  Tensors dA, dB;
};

// x is what A saw. Where that was not the layer's own x, the gradients of the two are `apart`.
Gradients backward(const Tensors& dys, const Tensor& x, const std::vector<Layer>& layers, const Tensors& us,
                   double scaling, bool needs_dx, bool apart) {
  const Tensor input = torch::stable::contiguous(x);
  const int64_t rows = rows_of(x);
  const size_t count = layers.size();
  STD_TORCH_CHECK(dys.size() == count && us.size() == count, "dy and u must be lists of the layers' length");

  Tensors gradients, downs, dus;
  for (size_t i = 0; i < count; i++) {
    const Layer& layer = layers[i];
    STD_TORCH_CHECK(dtype_of(dys[i], "dy") == dtype_of(x, "x") && dtype_of(us[i], "u") == dtype_of(x, "x"),
                    "dy, u and x must have the same dtype");
    gradients.push_back(torch::stable::contiguous(dys[i]));
    downs.push_back(torch::stable::contiguous(us[i]));
    STD_TORCH_CHECK(gradients[i].numel() == rows * layer.w.rows && downs[i].numel() == rows * layer.rank,
                    "dy must be [..., N] and u [..., r], with the rows of x");
    dus.push_back(empty_with_last(gradients[i], layer.rank));
    const Term up = {gradients[i], B_of(layer)};
    multiply(&up, 1, false, static_cast<float>(scaling), std::nullopt, dus[i]);
  }

  std::vector<Term> base, adapters;
  for (size_t i = 0; i < count; i++) {
    base.push_back({gradients[i], layers[i].w});
    (apart ? adapters : base).push_back({dus[i], A_of(layers[i])});
  }
  const auto sum_of = [&](const std::vector<Term>& terms, bool needed) {
    if (!needed) return torch::stable::new_empty(x, {0});
    Tensor sum = empty_with_last(input, x.size(-1));
    multiply(terms.data(), static_cast<int>(terms.size()), false, 1.0f, std::nullopt, sum);
    return sum;
  };
  Gradients result = {sum_of(base, needs_dx), sum_of(adapters, apart), {}, {}};
  for (size_t i = 0; i < count; i++) {
    Tensor dA = torch::stable::new_empty(layers[i].A, {layers[i].rank, layers[i].w.columns});
    outer(dus[i], input, dA);
    Tensor dB = torch::stable::new_empty(layers[i].A, {layers[i].rank, layers[i].w.rows});
    outer(downs[i], gradients[i], dB);
    result.dA.push_back(dA);
    result.dB.push_back(torch::stable::contiguous(torch::stable::transpose(dB, 0, 1)));
  }
  return result;
}

std::tuple<Tensor, Tensor> int4_lora_linear(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                            std::optional<Tensor> bias, const Tensor& lora_A, const Tensor& lora_B,
                                            double scaling, int64_t block, std::optional<Tensor> lora_x, bool int8) {
  STD_TORCH_CHECK(!lora_x || (dtype_of(*lora_x, "lora_x") == dtype_of(x, "x") && lora_x->numel() == x.numel()),
                  "lora_x must have x's shape and dtype");
  const auto [ys, us] =
      forward(x, lora_x ? *lora_x : x, {layer_of(x, codes, scales, lora_A, lora_B, block)}, bias, scaling, int8);
  return {ys[0], us[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> int4_lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& lora_A,
    const Tensor& lora_B, const Tensor& u, double scaling, int64_t block, bool needs_dx, bool apart) {
  const Gradients found =
      backward({dy}, x, {layer_of(x, codes, scales, lora_A, lora_B, block)}, {u}, scaling, needs_dx, apart);
  return {found.dx, found.d_lora_x, found.dA[0], found.dB[0]};
}

std::tuple<Tensors, Tensors> int4_lora_linears(const Tensor& x, Tensors codes, Tensors scales,
                                               std::optional<Tensor> bias, Tensors lora_A, Tensors lora_B,
                                               double scaling, int64_t block, bool int8) {
  const std::vector<Layer> layers = layers_of(x, codes, scales, lora_A, lora_B, block);
  int64_t columns = 0;
  for (const Layer& layer : layers) columns += layer.w.rows;
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == columns), "bias must be all biases, one after another: ",
                  columns, " elements");
  return forward(x, x, layers, bias, scaling, int8);
}

std::tuple<Tensor, Tensors, Tensors> int4_lora_linears_backward(Tensors dy, const Tensor& x, Tensors codes,
                                                                Tensors scales, Tensors lora_A, Tensors lora_B,
                                                                Tensors u, double scaling, int64_t block,
                                                                bool needs_dx) {
  const Gradients found =
      backward(dy, x, layers_of(x, codes, scales, lora_A, lora_B, block), u, scaling, needs_dx, false);
  return {found.dx, found.dA, found.dB};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("int4_lora_linear", TORCH_BOX(&int4_lora_linear));
  m.impl("int4_lora_linear_backward", TORCH_BOX(&int4_lora_linear_backward));
  m.impl("int4_lora_linears", TORCH_BOX(&int4_lora_linears));
  m.impl("int4_lora_linears_backward", TORCH_BOX(&int4_lora_linears_backward));
}

}  // namespace entrenar
