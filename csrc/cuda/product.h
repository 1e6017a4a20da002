// Products with an int4 weight.
#pragma once

#include <optional>
#include <vector>

#include "../arguments.h"

namespace entrenar {

// x as the matrix of its last dimension.
Tensor matrix(const Tensor& x);

// y = x op(W) + bias + low op(factor), where op transposes or not: low is [rows of x, rank], and factor lies as W does.
// All are contiguous and of one dtype, but a bias is float32.
struct Product {
  Tensor x;
  Weight w;
  Tensor y;
  std::optional<Tensor> bias, low, factor;
};

// Whether a kernel computes some products at once, each rounded once: several of one x, or, not transposed, their sum,
// which is the first's y; the first's low then has those of all side by side.
bool go_at_once(const std::vector<Product>& products, bool transposed);
void multiply_at_once(const std::vector<Product>& products, bool transposed);

// y = x op(W) + bias, or y += x op(W). This is the place where a product chooses its way.
void multiply(const Tensor& x, const Weight& w, bool transposed, const std::optional<Tensor>& bias, Tensor& y);
void multiply_add(const Tensor& x, const Weight& w, bool transposed, Tensor& y);

// Kernels read codes and scales in whole words.
void check_aligned(const Weight& w);

void refuse_int8(bool int8);

}  // namespace entrenar
