// Two bfloat16 in a word, the first one low.
#pragma once

#include "../int4.h"

namespace entrenar {

// a b + c, where that is exact but for one rounding, which the last addition makes.
INT4_HD uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16) {
    const float product = int4::bfloat16_to_float(a >> i) * int4::bfloat16_to_float(b >> i);  // 16 bits: exact
    d |= (uint32_t)int4::float_to_bfloat16(product + int4::bfloat16_to_float(c >> i)) << i;
  }
  return d;
#endif
}

INT4_HD uint32_t multiply_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return fma_pair(a, b, 0x80008000);
#endif
}

INT4_HD uint32_t subtract_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t d;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return fma_pair(b, 0xbf80bf80, a);
#endif
}

// Of floats.
INT4_HD uint32_t narrowed_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return int4::float_to_bfloat16(low) | (uint32_t)int4::float_to_bfloat16(high) << 16;
#endif
}

// The bits of word that mask names, and those of rest: one instruction, which the compiler does not find for constants.
INT4_HD uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t rest) {
#if defined(__CUDA_ARCH__)
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "r"(mask), "r"(rest));
  return d;
#else
  return (word & mask) | rest;
#endif
}

}  // namespace entrenar
