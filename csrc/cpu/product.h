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

// y = scale * (x0 op(w0) + x1 op(w1) + ...) + bias, where op transposes or not; y [rows, columns] has x's dtype. With
// `int8`, a transposed product rounds x0 to int8 for its int4 w0, unless the rows are so few that memory is the limit.
void multiply(const Term* terms, int count, bool transposed, float scale, const std::optional<Tensor>& bias, Tensor& y,
              bool int8 = false);

}  // namespace entrenar
