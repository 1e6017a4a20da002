// int4_lora_linear and int4_lora_linears on CUDA. In bfloat16 the products with a rank for one side are kernels of ours;
// the others, and all in float32, are torch's.
#include "../int4_lora_linear.h"

#include "blas.h"
#include "device.h"
#include "product.h"
#include "skinny.h"

namespace entrenar {

namespace {

using torch::stable::transpose;

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

const uint16_t* bits_of(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }
uint16_t* bits_of(Tensor& x) { return static_cast<uint16_t*>(x.mutable_data_ptr()); }

// With x in bfloat16 A and B are rounded, by one launch. For the gradients B then lies column by column.
std::vector<Layer> prepared(const Tensor& x, const std::vector<Layer>& given, bool gradients) {
  std::vector<Layer> layers = given;
  if (!is_bfloat16(x)) return layers;
  std::vector<Factor> factors;
  const auto round = [&](Tensor& from, bool transposed) {
    const int64_t rows = from.size(0), columns = from.size(1);
    Tensor out = torch::stable::new_empty(x, {transposed ? columns : rows, transposed ? rows : columns});
    factors.push_back({from.const_data_ptr<float>(), out.size(0), out.size(1), transposed, bits_of(out)});
    from = transposed ? transpose(out, 0, 1) : out;
  };
  for (Layer& layer : layers) {
    round(layer.A, false);
    round(layer.B, gradients);
  }
  const OnDevice device(x);
  device.check(skinny_round_cuda(factors.data(), static_cast<int64_t>(factors.size()), device.stream()));
  return layers;
}

// scaling x factorᵀ of each factor.
Tensors project(const Tensor& x, const Tensors& factors, double scaling) {
  Tensors results;
  std::vector<Projection> projections;
  for (const Tensor& factor : factors) {
    results.push_back(empty_with_last(x, factor.size(0)));
    Tensor& result = results.back();
    if (is_bfloat16(x)) {
      projections.push_back({bits_of(factor), factor.size(0), bits_of(result)});
    } else if (result.numel() > 0) {
      Tensor flat = matrix(result);
      addmm(flat, flat, matrix(x), transpose(factor, 0, 1), 0.0, scaling);
    }
  }
  if (projections.empty()) return results;
  const OnDevice device(x);
  device.check(skinny_project_cuda(bits_of(x), projections.data(), static_cast<int64_t>(projections.size()), rows_of(x),
                                   x.size(-1), static_cast<float>(scaling), device.stream()));
  return results;
}

Tensors project_down(const Tensor& x, const std::vector<Layer>& layers, double scaling) {
  Tensors factors;
  for (const Layer& layer : layers) factors.push_back(layer.A);
  return project(x, factors, scaling);
}

// In bfloat16 the smaller terms are written first: they are what is rounded in between, where that cannot be avoided.
void add_up(const Product& product) {
  const Tensor B = transpose(*product.factor, 0, 1);
  Tensor y = product.y;
  if (y.numel() == 0) return;
  if (product.bias) {
    addmm(y, torch::stable::to(*product.bias, y.scalar_type()), *product.low, B, 1.0);
  } else {
    addmm(y, y, *product.low, B, 0.0);
  }
  multiply_add(product.x, product.w, true, y);
}

Tensors project_up(const Tensor& x, const Tensors& us, const std::vector<Layer>& layers, const Biases& biases,
                   bool int8) {
  refuse_int8(int8);
  Tensors ys;
  std::vector<Product> products;
  for (size_t i = 0; i < layers.size(); i++) {
    ys.push_back(empty_with_last(x, layers[i].w.rows));
    products.push_back({matrix(x), layers[i].w, matrix(ys[i]), biases[i], matrix(us[i]), layers[i].B});
  }
  if (go_at_once(products, true)) {
    multiply_at_once(products, true);
  } else {
    for (const Product& product : products) add_up(product);
  }
  return ys;
}

Tensor project_back(const Tensor& dy, const Layer& layer, double scaling) {
  return project(dy, {transpose(layer.B, 0, 1)}, scaling)[0];
}

Tensor stacked_A(const std::vector<Layer>& layers) {
  if (layers.size() == 1) return layers[0].A;
  Tensor stacked = torch::stable::new_empty(layers[0].A, {ranks_of(layers), layers[0].w.columns});
  int64_t begin = 0;
  for (const Layer& layer : layers) {
    Tensor own = torch::stable::narrow(stacked, 0, begin, layer.rank);
    torch::stable::copy_(own, layer.A);
    begin += layer.rank;
  }
  return stacked;
}

Tensor side_by_side(const Tensors& parts, int64_t columns) {
  if (parts.size() == 1) return parts[0];
  Tensor all = empty_with_last(parts[0], columns);
  int64_t begin = 0;
  for (const Tensor& part : parts) {
    Tensor own = torch::stable::narrow(all, -1, begin, part.size(-1));
    torch::stable::copy_(own, part);
    begin += part.size(-1);
  }
  return all;
}

// One product of all dy with all W, where there is a kernel for that. Else each is added in place, which in bfloat16
// rounds the sum once for each layer: dy side by side would move 2 N more numbers for a row of dx than adding moves 2 K.
Tensor sum_back(const Tensor& x, const Tensors& dys, const Tensors& dus, const std::vector<Layer>& layers) {
  Tensor sum = empty_as(x), flat = matrix(sum);
  if (sum.numel() == 0) return sum;
  std::optional<Tensor> low;
  if (!dus.empty()) low = matrix(side_by_side(dus, ranks_of(layers)));
  std::vector<Product> products;
  for (size_t i = 0; i < dys.size(); i++) {
    products.push_back({matrix(dys[i]), layers[i].w, flat, {}, low, low ? std::optional(layers[i].A) : std::nullopt});
  }
  if (!products.empty() && go_at_once(products, false)) {
    multiply_at_once(products, false);
    return sum;
  }
  if (low) addmm(flat, flat, *low, stacked_A(layers), 0.0);
  for (size_t i = 0; i < dys.size(); i++) {
    if (i == 0 && !low) {
      multiply(matrix(dys[i]), layers[i].w, false, std::nullopt, flat);
    } else {
      multiply_add(matrix(dys[i]), layers[i].w, false, flat);
    }
  }
  return sum;
}

Tensor outer(const Tensor& narrow, const Tensor& wide, bool transposed) {
  const int64_t rows = rows_of(wide), rank = narrow.size(-1), columns = wide.size(-1);
  Tensor out = torch::stable::new_empty(wide, {transposed ? columns : rank, transposed ? rank : columns},
                                        ScalarType::Float);
  if (out.numel() == 0) return out;
  if (!is_bfloat16(wide)) {
    const Tensor &left = transposed ? wide : narrow, &right = transposed ? narrow : wide;
    addmm(out, out, transpose(matrix(left), 0, 1), matrix(right), 0.0);
    return out;
  }
  const OnDevice device(wide);
  const int64_t count = skinny_outer_parts(rows, columns);
  Tensor parts = torch::stable::new_empty(out, {count > 1 ? count * out.numel() : 0});
  device.check(skinny_outer_cuda(bits_of(narrow), bits_of(wide), rows, rank, columns, transposed,
                                 parts.mutable_data_ptr<float>(), out.mutable_data_ptr<float>(), device.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("int4_lora_linear", TORCH_BOX(&int4_lora_linear));
  m.impl("int4_lora_linear_backward", TORCH_BOX(&int4_lora_linear_backward));
  m.impl("int4_lora_linears", TORCH_BOX(&int4_lora_linears));
  m.impl("int4_lora_linears_backward", TORCH_BOX(&int4_lora_linears_backward));
}

}  // namespace entrenar
