// Products of matrices in torch tensors, spread over threads.
#pragma once

#include <optional>

#include "../arguments.h"
#include "level/kernels.h"

namespace entrenar {

// One factor of a product: a contiguous x [rows, contraction] and what it is multiplied by.
struct Term {
  const Tensor& x;
  Weight w;
};

// x rounded to int8 for products with int4 weights of w's columns and block, until the thread's next call; nothing where
// the rows are so few that memory is the limit.
std::optional<Int8Rows> rounded_to_int8(const Tensor& x, const Weight& w);

// y = scale * (x0 op(w0) + x1 op(w1) + ...) + bias, where op transposes or not; y [rows, columns] has x's dtype. In a
// transposed product `int8` may stand for x0, and w0 is int4 then.
void multiply(const Term* terms, int count, bool transposed, float scale, const std::optional<Tensor>& bias, Tensor& y,
              const std::optional<Int8Rows>& int8 = std::nullopt);

}  // namespace entrenar
