// Optimizer steps, as kernels of every device compute them: the same bits on all of them. Plain C types only.
#pragma once

#include <stdint.h>

#include "codes8bit.h"
#include "int4.h"
#include "weight.h"

namespace entrenar {

enum Rule { kSGD, kAdam, kLion };

constexpr int kMaxStates = 2;

// The numbers of one tensor's step, from its settings in double precision.
struct OptimStep {
  float sign;          // -1 to maximize
  float decay, l2;     // of the parameter itself, and into the gradient
  float keep1, gain1;  // what the first state keeps, and gains of the gradient
  float keep2, gain2;  // the second state; or, without one, state and gradient in the direction of the step
  float rate;          // of the direction in the parameter
  float root, eps;     // in Adam's denominator
  uint32_t key;        // of the draws of stochastic rounding
};

struct OptimTensor {
  void* param;
  const void* grad;
  void* states[kMaxStates];
  float* absmaxes[kMaxStates];  // of the states' blocks, where they are codes
  float* step;                  // counts from 1
  int64_t size;
};

// What all tensors of a call have in common.
struct OptimCall {
  Rule rule;
  int states;
  Dtype dtype, state_dtype;  // of parameters and gradients, and of states that are not codes
  bool codes;                // 8-bit states
  bool stochastic;           // rounding of bfloat16 parameters
  const float* factor;       // of the gradients, or null; if it is not finite, the step is left out
  const Codebook* codebooks[kMaxStates];
};

// Of float32 or a vector of them. M rounds each operation: `mul` is never fused with an addition, which would give other
// bits where there is no such instruction. `a` and `b` are the first and second state, as far as the rule has them.
template <Rule rule, class M, class V>
INT4_HD void optim_update(const OptimStep& s, int states, V grad, V& param, V& a, V& b) {
  param = M::mul(param, s.decay);
  if (s.l2 != 0) grad = grad + M::mul(param, s.l2);
  if constexpr (rule == kAdam) {  // Kingma and Ba, 2015; with `decay` Loshchilov and Hutter, 2019
    a = a + M::mul(grad - a, s.gain1);
    b = M::mul(b, s.keep2) + M::mul(M::mul(grad, s.gain2), grad);
    param = param - M::mul(a, s.rate) / (M::sqrt(b) / s.root + s.eps);
  } else if constexpr (rule == kLion) {  // Chen et al., 2023
    const V direction = M::mul(a, s.keep2) + M::mul(grad, s.gain2);
    a = M::mul(a, s.keep1) + M::mul(grad, s.gain1);
    param = param - M::mul(M::sign(direction), s.rate);
  } else {
    if (states) {
      a = M::mul(a, s.keep1) + M::mul(grad, s.gain1);
      grad = M::mul(grad, s.gain2) + M::mul(a, s.keep2);
    }
    param = param - M::mul(grad, s.rate);
  }
}

// 32 random bits for a word, of which the upper ones are the better. Multiplications and shifts of Wellons' "lowbias32".
template <class W>
INT4_HD W scramble(W word) {
  word = word ^ (word >> 16);
  word = word * 0x7feb352du;
  word = word ^ (word >> 15);
  word = word * 0x846ca68bu;
  return word ^ (word >> 16);
}

// Below which fraction of a unit (of 2^16) an element is rounded up: from the key of the step, the element's index and its
// gradient alone, so that neither threads nor what is beside the tensor matter, and tensors alike in shape still differ.
template <class W>
INT4_HD W optim_draw(W index, uint32_t key, W grad_bits) {
  return scramble(scramble(index + key) ^ grad_bits) >> 16;
}

}  // namespace entrenar
