// Mills' ratio, from which the normal distribution is computed on every device: for t >= 0, Φ(-t) = φ(t) M(t).
#pragma once

#include "int4.h"

namespace {

constexpr float kMillsSlope = 0.27f;

// M(t) from w = 1 / (1 + 0.27 t), of a number or a vector: a polynomial fitted for the least largest relative error
// (2.4e-8) up to t = 14.5, where φ leaves float32.
template <class Float>
INT4_HD Float mills_ratio(Float w) {
  Float mills = w * 0x1.295958p-4f - 0x1.44a9dep-2f;
  mills = mills * w + 0x1.b3ceb4p-2f;
  mills = mills * w - 0x1.634de2p-3f;
  mills = mills * w + 0x1.14c472p-2f;
  mills = mills * w + 0x1.71ded6p-3f;
  mills = mills * w + 0x1.05538ep-2f;
  mills = mills * w + 0x1.140a28p-2f;
  mills = mills * w + 0x1.147efcp-2f;
  return mills * w;
}

}  // namespace
