// Functions of a float that take many instructions in full: of float32 all digits are computed, of 16 bits the leading
// ones, by a single instruction that is off by a few units of float32.
#pragma once

#include "floats.h"

namespace entrenar {

// e^x. With 16 bits it is off by as much again as x is rounded, and 0 where float32 is denormal.
template <Dtype dtype>
static __device__ inline float exponential(float x) {
  if constexpr (dtype == kFloat32) {
    return expf(x);
  } else {
    x *= 0x1.715476p+0f;  // log2 e
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
  }
}

// 1 / x to within a unit or so of float32, and 0 where that is denormal.
static __device__ inline float about_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

template <Dtype dtype>
static __device__ inline float reciprocal(float x) {
  return dtype == kFloat32 ? 1.0f / x : about_reciprocal(x);
}

}  // namespace entrenar
