// Products with an int4 weight.
#pragma once

#include <optional>

#include "../arguments.h"

namespace entrenar {

// x as the matrix of its last dimension.
Tensor matrix(const Tensor& x);

// y = x op(W) + bias, or y += x op(W), where op transposes or not. x and y are contiguous matrices of one dtype.
// This is the place where a product chooses its way.
void multiply(const Tensor& x, const Weight& w, bool transposed, const std::optional<Tensor>& bias, Tensor& y);
void multiply_add(const Tensor& x, const Weight& w, bool transposed, Tensor& y);

// Kernels read codes and scales in whole words.
void check_aligned(const Weight& w);

void refuse_int8(bool int8);

}  // namespace entrenar
