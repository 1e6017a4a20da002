// Functions of a vector of float32.
#pragma once

#include "../../mills.h"
#include "simd.h"

namespace {

// a > b ? a : b and a < b ? a : b, so b where either is NaN; gcc takes two instructions for such a choice.
#if defined(__AVX512F__)
inline vfloat larger(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
inline vfloat smaller(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline vfloat larger(vfloat a, vfloat b) { return a > b ? a : b; }
inline vfloat smaller(vfloat a, vfloat b) { return a < b ? a : b; }
#endif

// e^x, off by at most 1.01 units in the last place over all x; right at subnormal results, overflow, infinity and NaN.
// Cody and Waite: x = n ln 2 + r with ln 2 in two parts, of which n times the first is exact; e^r by a polynomial.
inline vfloat vexp(vfloat x) {
  const vfloat highest = broadcast(105.0f);  // from here on the result is infinite, below its negative 0
  x = larger(-highest, smaller(highest, x));
  const vfloat shift = broadcast(0x1.8p23f);  // the sum's last bit is worth one, so it rounds to an integer
  const vfloat shifted = x * 0x1.715476p+0f + shift;
  const vfloat n = shifted - shift;
  const vfloat r = (x - n * 0x1.63p-1f) + n * 0x1.bd0106p-13f;
  vfloat q = broadcast(0x1.6a23d0p-10f);  // (e^r - 1 - r) / r² on [-ln 2 / 2, ln 2 / 2], within 2^-28 of e^r
  q = q * r + 0x1.123a20p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const vfloat power = q * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)power, (__m512)n);
#else
  // 2^n in two factors, for it may be beyond float32 where the result is not.
  const vint exponent = (vint)shifted - (vint)shift, half = exponent >> 1;
  return power * (vfloat)((half + 127) << 23) * (vfloat)((exponent - half + 127) << 23);
#endif
}

// The same with 0 for results below e^-87, which is almost the least normal value: a subnormal one takes some processors
// as long as a hundred others, and of those that a softmax has masked all are such.
inline vfloat vexp_or_zero(vfloat x) {
  const vfloat lowest = broadcast(-87.0f);
  const vfloat power = vexp(larger(lowest, x));
  return x < lowest ? vfloat{} : power;
}

#if defined(__AVX512DQ__)
// Each x to 2^x, off by at most 2.7e-6 of itself, which is nothing to what rounding to bfloat16 takes; 0 below 2^-126.
// Step by step for all of them, since a processor does not look far enough ahead to overlap one after another.
template <int kCount>
inline __attribute__((always_inline)) void vexp2_coarse(vfloat (&x)[kCount]) {
  vfloat r[kCount], power[kCount];  // 2^r on [0, 1]
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) r[i] = (vfloat)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) power[i] = 0x1.bb7cd4p-7f * r[i] + 0x1.aa13f0p-5f;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) power[i] = power[i] * r[i] + 0x1.ee798ap-3f;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) power[i] = power[i] * r[i] + 0x1.62d166p-1f;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) power[i] = power[i] * r[i] + 0x1.00002cp+0f;
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) {
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);  // or NaN
    x[i] = (vfloat)_mm512_maskz_scalef_ps(normal, (__m512)power[i], (__m512)x[i]);
  }
}
#endif

// 1 / (1 + e^-x), off by at most 2.4 units in the last place: those of the exponential, the sum and the quotient.
inline vfloat vsigmoid(vfloat x) { return 1.0f / (1.0f + vexp(-x)); }

// The normal distribution: its density φ(x) = e^(-x²/2) / √2π, and Φ(x), the integral of φ up to x. Errors, over all x
// whose Φ is normal: of φ and Φ 3 and 9 units of 2^-24 of themselves, and x² 2^-25 for the rounding of x²; of Φ for x > 0
// 5 units of 2^-24.
struct Normal {
  vfloat density, distribution;
};

inline Normal vnormal(vfloat x) {
  const vfloat t = x < 0 ? -x : x;
  const vfloat ratio = mills_ratio(1.0f / (1.0f + kMillsSlope * t));
  const vfloat density = 0x1.988454p-2f * vexp(-0.5f * (x * x));
  const vfloat tail = density * ratio;
  return {density, x < 0 ? tail : 1.0f - tail};
}

}  // namespace
