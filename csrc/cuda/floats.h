// Elements of tensors in device code: 16 or 32 bits in memory, float32 in registers.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../int4.h"
#include "../weight.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace entrenar {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <Dtype>
struct Float;

template <>
struct Float<kFloat32> {
  using Bits = float;
  static __device__ float widen(Bits bits) { return bits; }
  static __device__ Bits narrow(float value) { return value; }
};

template <>
struct Float<kBFloat16> {
  using Bits = uint16_t;
  static __device__ float widen(Bits bits) { return int4::bfloat16_to_float(bits); }
  static __device__ Bits narrow(float value) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
    return value != value ? 0x7fff : int4::float_to_bfloat16(value);
#endif
  }
};

template <>
struct Float<kFloat16> {
  using Bits = uint16_t;
  static __device__ float widen(Bits bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    return int4::half_to_float(bits);
#endif
  }
  static __device__ Bits narrow(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    return int4::float_to_half(value);
#endif
  }
};

// The dynamic shared memory of a block.
static __device__ inline char* shared_memory() {
#if defined(ENTRENAR_EMULATED)
  return emulator::shared_memory();
#else
  extern __shared__ __align__(1024) char shared[];
  return shared;
#endif
}

// Neighbours in memory, moved by one instruction where they are 4, 8 or 16 aligned bytes.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

// f(dtype) with a dtype that is known when f is compiled: decltype(dtype)::value.
template <class F>
auto with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case kBFloat16: return f(std::integral_constant<Dtype, kBFloat16>());
    case kFloat16: return f(std::integral_constant<Dtype, kFloat16>());
    default: return f(std::integral_constant<Dtype, kFloat32>());
  }
}

// Sums over the lanes of a warp, in an order that does not vary.
static __device__ inline float warp_sum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

static __device__ inline float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

}  // namespace entrenar
