// int4_lora_linear: y = x Wᵀ + b + u Bᵀ with u = scaling x Aᵀ, and its gradients: with du = scaling dy B,
// dx = dy W + du A, dA = duᵀ x, dB = dyᵀ u. int4_lora_linears: several of them at one x, whose dx is one sum.
// swiglu_int4_lora_linear: one at x = silu(gate) up, which is computed anew for dA.
//
// What every device shares: the ops, their checks, and the order of their products. A device includes this once, in the
// file that defines its products and registers the ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"
#include "arguments.h"

namespace entrenar {

namespace {

using Tensors = std::vector<Tensor>;

struct Layer {
  Tensor codes, scales;
  Weight w;
  Tensor A, B;  // contiguous, until the device has prepared them
  int64_t rank;
};

// The products, which each device defines. Tensors are contiguous, and have checked sizes.

// The layers with A and B as the products take them: those of the forward, or of the gradients.
std::vector<Layer> prepared(const Tensor& x, const std::vector<Layer>& given, bool gradients);

// scaling x Aᵀ of each layer, in one pass over x.
Tensors project_down(const Tensor& x, const std::vector<Layer>& layers, double scaling);

// x W_iᵀ + u_i B_iᵀ + bias_i of each layer.
using Biases = std::vector<std::optional<Tensor>>;
Tensors project_up(const Tensor& x, const Tensors& us, const std::vector<Layer>& layers, const Biases& biases,
                   bool int8);

// du_i = scaling dy_i B_i, in whatever tensors the next two take them.
Tensors project_back(const Tensors& dys, const std::vector<Layer>& layers, double scaling);

// Σ dy_i W_i + du_i A_i, into a tensor like x. Either list may be empty.
Tensor sum_back(const Tensor& x, const Tensors& dys, const Tensors& dus, const std::vector<Layer>& layers);

struct AdapterGradients {
  Tensors dA, dB;
};

// dA_i = du_iᵀ x, and dB_i = dy_iᵀ u_i, in float32.
AdapterGradients outer_products(const Tensor& x, const Tensors& dys, const Tensors& us, const Tensors& dus,
                                const std::vector<Layer>& layers);

Layer layer_of(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& lora_A, const Tensor& lora_B,
               int64_t block) {
  STD_TORCH_CHECK(x.dim() > 0 && lora_A.dim() == 2, "x must have at least one dimension, and lora_A two");
  Layer layer = {codes, scales, int4_weight(codes, scales, x.size(-1), block), packed(lora_A), packed(lora_B),
                 lora_A.size(0)};
  dense_weight(layer.B, layer.w.rows, layer.rank, "lora_B");
  dense_weight(layer.A, layer.rank, layer.w.columns, "lora_A");
  check_device(codes, "codes", x);
  check_device(scales, "scales", x);
  check_device(lora_A, "lora_A", x);
  check_device(lora_B, "lora_B", x);
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

int64_t ranks_of(const std::vector<Layer>& layers) {
  int64_t ranks = 0;
  for (const Layer& layer : layers) ranks += layer.rank;
  return ranks;
}

std::tuple<Tensors, Tensors> forward(const Tensor& x, const Tensor& lora_x, const std::vector<Layer>& given,
                                     std::optional<Tensor> bias, double scaling, bool int8) {
  check_device(lora_x, "lora_x", x);
  if (bias) check_device(*bias, "bias", x);
  const std::vector<Layer> layers = prepared(x, given, false);
  Biases biases;
  int64_t begin = 0;
  for (const Layer& layer : layers) {
    std::optional<Tensor> own;
    if (bias) own = layers.size() == 1 ? *bias : torch::stable::narrow(*bias, 0, begin, layer.w.rows);
    check_bias(own, layer.w.rows);
    biases.push_back(own);
    begin += layer.w.rows;
  }
  const Tensors us = project_down(packed(lora_x), layers, scaling);
  return {project_up(packed(x), us, layers, biases, int8), us};
}

// What the layers kept and were given, as the products of the gradients take it.
struct Backward {
  std::vector<Layer> layers;
  Tensors dys, us, dus;
};

void check_rows(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.size(-1) == columns && rows_of(tensor) == rows, name, " must have ", rows,
                  " rows, those of x, of ", columns);
}

// x stands for its shape and dtype alone.
Backward backward_of(const Tensors& dys, const Tensor& x, const std::vector<Layer>& given, const Tensors& us,
                     double scaling) {
  Backward back = {prepared(x, given, true), {}, {}, {}};
  const int64_t rows = rows_of(x);
  const size_t count = given.size();
  STD_TORCH_CHECK(dys.size() == count && us.size() == count, "dy and u must be lists of the layers' length");
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(dtype_of(dys[i], "dy") == dtype_of(x, "x") && dtype_of(us[i], "u") == dtype_of(x, "x"),
                    "dy, u and x must have the same dtype");
    check_device(dys[i], "dy", x);
    check_device(us[i], "u", x);
    check_rows(dys[i], "dy", rows, given[i].w.rows);
    check_rows(us[i], "u", rows, given[i].rank);
    back.dys.push_back(packed(dys[i]));
    back.us.push_back(packed(us[i]));
  }
  back.dus = project_back(back.dys, back.layers, scaling);
  return back;
}

struct Gradients {
  Tensor dx, d_lora_x;
  AdapterGradients adapters;
};

// x is what A saw. Where that was not the layer's own x, the gradients of the two are `apart`.
Gradients backward(const Tensors& dys, const Tensor& given_x, const std::vector<Layer>& given, const Tensors& us,
                   double scaling, bool needs_dx, bool apart) {
  const Tensor x = packed(given_x);
  const Backward back = backward_of(dys, x, given, us, scaling);
  const auto none = [&x] { return torch::stable::new_empty(x, {0}); };  // a new one each: results share no memory
  const AdapterGradients adapters = outer_products(x, back.dys, back.us, back.dus, back.layers);
  return {needs_dx ? sum_back(x, back.dys, apart ? Tensors() : back.dus, back.layers) : none(),
          apart ? sum_back(x, {}, back.dus, back.layers) : none(), adapters};
}

std::tuple<Tensor, Tensor> int4_lora_linear(const Tensor& x, const Tensor& codes, const Tensor& scales,
                                            std::optional<Tensor> bias, const Tensor& lora_A, const Tensor& lora_B,
                                            double scaling, int64_t block, std::optional<Tensor> lora_x, bool int8) {
  if (lora_x) check_like(*lora_x, "lora_x", x);
  const auto [ys, us] =
      forward(x, lora_x ? *lora_x : x, {layer_of(x, codes, scales, lora_A, lora_B, block)}, bias, scaling, int8);
  return {ys[0], us[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> int4_lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& lora_A,
    const Tensor& lora_B, const Tensor& u, double scaling, int64_t block, bool needs_dx, bool apart) {
  const Gradients found =
      backward({dy}, x, {layer_of(x, codes, scales, lora_A, lora_B, block)}, {u}, scaling, needs_dx, apart);
  return {found.dx, found.d_lora_x, found.adapters.dA[0], found.adapters.dB[0]};
}

std::tuple<Tensor, Tensor> swiglu_int4_lora_linear(const Tensor& gate, const Tensor& up, const Tensor& codes,
                                                   const Tensor& scales, std::optional<Tensor> bias,
                                                   const Tensor& lora_A, const Tensor& lora_B, double scaling,
                                                   int64_t block, bool int8) {
  const std::vector<Layer> layers = {layer_of(gate, codes, scales, lora_A, lora_B, block)};
  const Tensor x = swiglu(gate, up);
  const auto [ys, us] = forward(x, x, layers, bias, scaling, int8);
  return {ys[0], us[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_int4_lora_linear_backward(
    const Tensor& dy, const Tensor& gate, const Tensor& up, const Tensor& codes, const Tensor& scales,
    const Tensor& lora_A, const Tensor& lora_B, const Tensor& u, double scaling, int64_t block) {
  const Backward back =
      backward_of({dy}, gate, {layer_of(gate, codes, scales, lora_A, lora_B, block)}, {u}, scaling);
  Tensor dx = sum_back(gate, back.dys, back.dus, back.layers);
  const auto [dgate, dup] = swiglu_backward_and(dx.mutable_data_ptr(), dx, gate, up);
  const Tensor& x = dx;  // now
  const AdapterGradients adapters = outer_products(x, back.dys, back.us, back.dus, back.layers);
  return {dgate, dup, adapters.dA[0], adapters.dB[0]};
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
  return {found.dx, found.adapters.dA, found.adapters.dB};
}

}  // namespace

}  // namespace entrenar
