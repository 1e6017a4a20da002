// int4_lora_linear, int4_lora_linears and swiglu_int4_lora_linear on CUDA. In bfloat16 the products with a rank for one
// side are kernels of ours; the others, and all in float32, are torch's.
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

// scaling x factorᵀ for each.
struct Projected {
  const Tensor &x, &factor;
  Tensor out;  // a matrix, perhaps of columns among others
};

void project(const std::vector<Projected>& all, double scaling) {
  std::vector<Projection> projections;
  for (const Projected& one : all) {
    Tensor out = one.out;
    if (is_bfloat16(one.x)) {
      projections.push_back({bits_of(one.x), one.x.size(-1), bits_of(one.factor), one.factor.size(0), bits_of(out),
                             out.stride(0)});
    } else if (out.numel() > 0) {
      addmm(out, out, matrix(one.x), transpose(one.factor, 0, 1), 0.0, scaling);
    }
  }
  if (projections.empty()) return;
  const Tensor& x = all[0].x;
  const OnDevice device(x);
  device.check(skinny_project_cuda(projections.data(), static_cast<int64_t>(projections.size()), rows_of(x),
                                   static_cast<float>(scaling), device.stream()));
}

Tensors project_down(const Tensor& x, const std::vector<Layer>& layers, double scaling) {
  Tensors us;
  std::vector<Projected> all;
  for (const Layer& layer : layers) {
    us.push_back(empty_with_last(x, layer.rank));
    all.push_back({x, layer.A, matrix(us.back())});
  }
  project(all, scaling);
  return us;
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

// In float32 [rank, columns], or its transpose, for each: narrowᵀ x.
struct Outer {
  const Tensor &narrow, &x;  // a matrix, perhaps of columns among others
  bool transposed;
};

Tensors outer(const std::vector<Outer>& all) {
  Tensors results;
  std::vector<OuterProduct> products;
  int64_t numel = 0;
  for (const Outer& one : all) {
    const int64_t rank = one.narrow.size(-1), columns = one.x.size(-1);
    results.push_back(torch::stable::new_empty(
        one.x, {one.transposed ? columns : rank, one.transposed ? rank : columns}, ScalarType::Float));
    Tensor& out = results.back();
    numel += out.numel();
    if (is_bfloat16(one.x)) {
      products.push_back({bits_of(one.x), columns, bits_of(one.narrow), one.narrow.stride(0), rank, one.transposed,
                          out.mutable_data_ptr<float>()});
    } else if (out.numel() > 0) {
      const Tensor x = matrix(one.x);
      addmm(out, out, transpose(one.transposed ? x : one.narrow, 0, 1), one.transposed ? one.narrow : x, 0.0);
    }
  }
  if (products.empty()) return results;
  const Tensor& x = all[0].x;
  const OnDevice device(x);
  const auto count = static_cast<int64_t>(products.size());
  const int64_t parts = skinny_outer_parts(products.data(), count, rows_of(x));
  Tensor scratch = torch::stable::new_empty(x, {parts > 1 ? parts * numel : 0}, ScalarType::Float);
  device.check(skinny_outer_cuda(products.data(), count, rows_of(x), scratch.mutable_data_ptr<float>(),
                                 device.stream()));
  return results;
}

// The columns of each layer, of what lies side by side for all.
Tensors of_layers(Tensor all, const std::vector<Layer>& layers) {
  Tensors parts;
  int64_t begin = 0;
  for (const Layer& layer : layers) {
    parts.push_back(torch::stable::narrow(all, 1, begin, layer.rank));
    begin += layer.rank;
  }
  return parts;
}

// All du side by side, as the product takes them that adds them up.
Tensors project_back(const Tensors& dys, const std::vector<Layer>& layers, double scaling) {
  const Tensor all = torch::stable::new_empty(dys[0], {rows_of(dys[0]), ranks_of(layers)});
  const Tensors dus = of_layers(all, layers);
  Tensors factors;
  for (const Layer& layer : layers) factors.push_back(transpose(layer.B, 0, 1));
  std::vector<Projected> down;
  for (size_t i = 0; i < layers.size(); i++) down.push_back({dys[i], factors[i], dus[i]});
  project(down, scaling);
  return {all};
}

AdapterGradients outer_products(const Tensor& x, const Tensors& dys, const Tensors& us, const Tensors& all,
                                const std::vector<Layer>& layers) {
  const size_t count = layers.size();
  const Tensors dus = of_layers(all[0], layers);
  Tensors lows;
  for (const Tensor& u : us) lows.push_back(matrix(u));
  std::vector<Outer> products;
  for (const Tensor& du : dus) products.push_back({du, x, false});
  for (size_t i = 0; i < count; i++) products.push_back({lows[i], dys[i], true});
  const Tensors both = outer(products);
  const auto dB = both.begin() + static_cast<std::ptrdiff_t>(count);
  return {{both.begin(), dB}, {dB, both.end()}};
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

// One product of all dy with all W, where there is a kernel for that. Else each is added in place, which in bfloat16
// rounds the sum once for each layer: dy side by side would move 2 N more numbers for a row of dx than adding moves 2 K.
Tensor sum_back(const Tensor& x, const Tensors& dys, const Tensors& dus, const std::vector<Layer>& layers) {
  Tensor sum = empty_as(x), flat = matrix(sum);
  if (sum.numel() == 0) return sum;
  std::optional<Tensor> low;
  if (!dus.empty()) low = dus[0];
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) {
  m.impl("int4_lora_linear", TORCH_BOX(&int4_lora_linear));
  m.impl("int4_lora_linear_backward", TORCH_BOX(&int4_lora_linear_backward));
  m.impl("int4_lora_linears", TORCH_BOX(&int4_lora_linears));
  m.impl("int4_lora_linears_backward", TORCH_BOX(&int4_lora_linears_backward));
  m.impl("swiglu_int4_lora_linear", TORCH_BOX(&swiglu_int4_lora_linear));
  m.impl("swiglu_int4_lora_linear_backward", TORCH_BOX(&swiglu_int4_lora_linear_backward));
}

}  // namespace entrenar
