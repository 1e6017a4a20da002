// Products with an int4 weight.
#pragma once

#include <optional>

#include "../arguments.h"

namespace entrenar {

// x as the matrix of its last dimension.
Tensor matrix(const Tensor& x);

// A term that a product adds before it rounds: low op(factor), where op is that of W. low [rows of x, rank], and
// factor, which lies as W does, are contiguous and of x's dtype.
struct Term {
  Tensor low, factor;
};

// Whether multiply takes a term with that low.
bool takes_term(const Tensor& x, const Weight& w, bool transposed, const Tensor& low, const Tensor& y);

// y = x op(W) + bias + term, or y += x op(W), where op transposes or not. x and y are contiguous matrices of one dtype.
// This is the place where a product chooses its way.
void multiply(const Tensor& x, const Weight& w, bool transposed, const std::optional<Tensor>& bias, Tensor& y,
              const std::optional<Term>& term = std::nullopt);
void multiply_add(const Tensor& x, const Weight& w, bool transposed, Tensor& y);

// Kernels read codes and scales in whole words.
void check_aligned(const Weight& w);

void refuse_int8(bool int8);

}  // namespace entrenar
