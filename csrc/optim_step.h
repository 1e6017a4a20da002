// The numbers of an optimizer's step from its settings. Not for the kernels of a level: it needs the library's pow.
#pragma once

#include <math.h>

#include "optim.h"

namespace entrenar {

// As they are given. SGD's momentum and dampening are beta1 and beta2.
struct OptimSettings {
  Rule rule;
  bool decoupled, nesterov, maximize;
  double lr, beta1, beta2, eps, weight_decay;
  int64_t seed;
};

INT4_HD OptimStep optim_step(const OptimSettings& s, double step) {
  OptimStep f = {};
  f.sign = s.maximize ? -1.0f : 1.0f;
  f.decay = s.decoupled ? (float)(1 - s.lr * s.weight_decay) : 1.0f;
  f.l2 = s.decoupled ? 0.0f : (float)s.weight_decay;
  f.rate = (float)s.lr;
  f.keep1 = (float)s.beta1;
  f.gain1 = (float)(1 - s.beta1);
  f.keep2 = (float)s.beta2;
  f.gain2 = (float)(1 - s.beta2);
  if (s.rule == kAdam) {
    f.rate = (float)(s.lr / (1 - pow(s.beta1, step)));
    f.root = (float)sqrt(1 - pow(s.beta2, step));
    f.eps = (float)s.eps;
  } else if (s.rule == kLion) {
    f.keep1 = (float)s.beta2;
    f.gain1 = (float)(1 - s.beta2);
    f.keep2 = (float)s.beta1;
    f.gain2 = (float)(1 - s.beta1);
  } else {
    const bool first = step == 1;  // the buffer begins as the gradient
    f.keep1 = first ? 0.0f : (float)s.beta1;
    f.gain1 = first ? 1.0f : (float)(1 - s.beta2);
    f.keep2 = s.nesterov ? (float)s.beta1 : 1.0f;
    f.gain2 = s.nesterov ? 1.0f : 0.0f;
  }
  const uint64_t seed = (uint64_t)s.seed;
  f.key = scramble(scramble((uint32_t)seed ^ scramble((uint32_t)(seed >> 32))) + (uint32_t)(int64_t)step);
  return f;
}

}  // namespace entrenar
