#include "product.h"

#include <torch/csrc/stable/ops.h>

#include "blas.h"
#include "device.h"
#include "dot.h"
#include "int4.h"
#include "product_sm90.h"

namespace entrenar {

Tensor matrix(const Tensor& x) { return torch::stable::view(x, {rows_of(x), x.size(-1)}); }

void check_aligned(const Weight& w) {
  const auto codes = reinterpret_cast<uintptr_t>(w.codes), scales = reinterpret_cast<uintptr_t>(w.scales);
  STD_TORCH_CHECK(codes % int4::kGroupBytes == 0 && scales % (w.float32_scales ? 4 : 2) == 0,
                  "codes must begin at a multiple of 16 bytes, and scales at one of a scale's: clone them");
}

void refuse_int8(bool int8) {
  STD_TORCH_CHECK(!int8, "int8 activations must be off on CUDA: only the CPU has a product for them");
}

namespace {

// W in x's dtype, in memory that lives as long as the call. Torch's caching allocator hands the same memory to the next
// one at once, and knows streams and CUDA graphs, which a buffer of our own would have to learn.
Tensor decode(const Weight& w, const Tensor& x) {
  check_aligned(w);
  const Dtype dtype = dtype_of(x, "x");
  const int64_t run = dtype == kFloat32 ? 4 : 8;  // elements in 16 bytes, at multiples of which rows begin
  const int64_t stride = (w.columns + run - 1) / run * run;
  Tensor decoded = torch::stable::new_empty(x, {w.rows, stride});
  const OnDevice device(x);
  device.check(int4_dequantize_cuda(w, dtype, decoded.mutable_data_ptr(), stride, device.stream()));
  return stride == w.columns ? decoded : torch::stable::narrow(decoded, 1, 0, w.columns);
}

void multiply_decoded(const Tensor& x, const Weight& w, bool transposed, const Tensor& self, double beta, Tensor& y) {
  const Tensor decoded = decode(w, x);
  addmm(y, self, x, transposed ? torch::stable::transpose(decoded, 0, 1) : decoded, beta);
}

// Straight from the codes.
void multiply_few(const Tensor& x, const Weight& w, bool transposed, const std::optional<Tensor>& bias, bool add_to_y,
                  Tensor& y) {
  if (!transposed) {
    STD_TORCH_CHECK(!bias, "a gradient has no bias");
    const OnDevice device(x);
    device.check(int4_dot_gradient_cuda(w, dtype_of(x, "x"), x.const_data_ptr(), rows_of(x), add_to_y,
                                        y.mutable_data_ptr(), device.stream()));
    return;
  }
  std::optional<Tensor> own;
  if (bias) own = packed(*bias);
  const OnDevice device(x);
  device.check(int4_dot_cuda(w, dtype_of(x, "x"), x.const_data_ptr(), rows_of(x),
                             own ? own->const_data_ptr<float>() : nullptr, add_to_y, y.mutable_data_ptr(),
                             device.stream()));
}

// Up to so many rows of x the codes are multiplied as they are. On an H200 y of 32 rows took 12, 30 and 29 us for
// 4096 x 4096, 11008 x 4096 and 4096 x 11008, and by Hopper's own product, below, which takes no longer for 64 rows, 19,
// 31 and 40. dx of 8 rows took 17, 42 and 31 us, and 21, 46 and 33.
constexpr int64_t kFewRows = 32, kFewGradientRows = 8;

bool are_few(const Tensor& x, const Weight& w, bool transposed) {
  const int64_t rows = rows_of(x);
  return transposed ? rows <= kFewRows && int4_dot_takes(w, dtype_of(x, "x"), rows)
                    : rows <= kFewGradientRows && int4_dot_gradient_takes(w, rows);
}

// Where Hopper's own kernel, which decodes W on the way to the tensor cores, takes less time than decoding W first. On an
// H200, for weights of 4096 x 4096, 11008 x 4096 and 4096 x 11008, it took 0.64 to 1 of that up to 2048 rows of dx, and
// 0.97 to 1.04 for 4096; with a term, which is nearly free in it, 0.62 to 0.96 and 0.92 to 1.02. `python -m
// benchmarks.cuda.int4_linear` has both ways.
constexpr int64_t kManyGradientRows = 4096;

bool pays_on_hopper(int64_t rows, bool transposed, bool with_term) {
  return transposed || with_term || rows < kManyGradientRows;
}

int rank_of(const Product& product, bool transposed) {
  return product.factor ? static_cast<int>(product.factor->size(transposed ? -1 : 0)) : 0;
}

ProductSm90 hopper_product(const std::vector<Product>& products, bool transposed) {
  ProductSm90 all = {};
  all.count = static_cast<int>(products.size());
  all.gradient = !transposed;
  all.tokens = rows_of(products[0].x);
  all.rank = rank_of(products[0], transposed);
  for (size_t i = 0; i < products.size(); i++) {
    const Product& one = products[i];
    ProductSm90::Source& source = all.sources[i];
    source.weight = one.w;
    source.in = one.x.const_data_ptr();
    source.out = const_cast<void*>(one.y.const_data_ptr());
    source.bias = one.bias ? one.bias->const_data_ptr<float>() : nullptr;
    source.low = one.low ? one.low->const_data_ptr() : nullptr;
    source.factor = one.factor ? one.factor->const_data_ptr() : nullptr;
  }
  return all;
}

}  // namespace

bool go_at_once(const std::vector<Product>& products, bool transposed) {
  const Tensor& x = products[0].x;
  if (x.scalar_type() != ScalarType::BFloat16 || products.size() > ProductSm90::kMost) return false;
  const ProductSm90 all = hopper_product(products, transposed);
  for (const Product& one : products) {
    if (one.y.numel() == 0 || rank_of(one, transposed) != all.rank || are_few(one.x, one.w, transposed)) return false;
  }
  if (!pays_on_hopper(all.tokens, transposed, all.rank > 0)) return false;
  const OnDevice device(x);
  return product_sm90_takes(all);
}

void multiply_at_once(const std::vector<Product>& products, bool transposed) {
  std::vector<Product> own = products;
  for (Product& one : own) {
    if (one.bias) one.bias = packed(*one.bias);
  }
  const OnDevice device(own[0].x);
  device.check(product_sm90(hopper_product(own, transposed), device.stream()));
}

void multiply(const Tensor& x, const Weight& w, bool transposed, const std::optional<Tensor>& bias, Tensor& y) {
  if (y.numel() == 0) return;
  if (are_few(x, w, transposed)) {
    multiply_few(x, w, transposed, bias, false, y);
    return;
  }
  const std::vector<Product> one = {{x, w, y, bias, std::nullopt, std::nullopt}};
  if (go_at_once(one, transposed)) {
    multiply_at_once(one, transposed);
  } else if (bias) {
    multiply_decoded(x, w, transposed, torch::stable::to(*bias, y.scalar_type()), 1.0, y);
  } else {
    multiply_decoded(x, w, transposed, y, 0.0, y);
  }
}

void multiply_add(const Tensor& x, const Weight& w, bool transposed, Tensor& y) {
  if (y.numel() == 0) return;
  if (are_few(x, w, transposed)) {
    multiply_few(x, w, transposed, std::nullopt, true, y);
  } else {
    multiply_decoded(x, w, transposed, y, 1.0, y);
  }
}

}  // namespace entrenar
