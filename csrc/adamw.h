// An AdamW step (Loshchilov and Hutter, 2019), as kernels of every device compute it. Plain C types only.
#pragma once

#include <stdint.h>

#include "int4.h"
#include "weight.h"

namespace entrenar {

// The numbers of a step, from its settings in double precision.
struct AdamWStep {
  float decay;                // 1 - lr * weight_decay
  float gain1, beta2, gain2;  // 1 - beta1; beta2; 1 - beta2
  float rate, root, eps;      // lr / (1 - beta1^t); sqrt(1 - beta2^t)
};

struct AdamWTensor {
  void* param;
  const void* grad;
  void *exp_avg, *exp_avg_sq;
  int64_t size;
};

// Of float32 or a vector of them, whose square root is `root`.
template <class V, class Root>
INT4_HD void adamw_update(const AdamWStep& s, V grad, V& param, V& exp_avg, V& exp_avg_sq, const Root& root) {
  param *= s.decay;
  exp_avg += s.gain1 * (grad - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.gain2 * (grad * grad);
  param -= s.rate * exp_avg / (root(exp_avg_sq) / s.root + s.eps);
}

}  // namespace entrenar
