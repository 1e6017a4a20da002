// Rotary position embedding: y = x cos + R x sin with R (a, b) = (-b, a), and its transpose y = x cos - R (x sin).
#include "rotary.h"

#include "rows.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;

// A thread for each pair of packs, one in either half of a row. Index is as wide as the number of threads asks: divisions
// of 64 bits take many instructions.
template <Dtype dtype, int n, class Index>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Rotary r, Index count) {
  using Bits = typename Float<dtype>::Bits;
  const Index thread = (Index)blockIdx.x * kThreads + threadIdx.x;
  if (thread >= count) return;
  const Index packs = (Index)r.half / n;
  Index row = thread / packs;
  const int64_t i = (int64_t)(thread - row * packs) * n, j = i + r.half;
  int64_t at[Rotary::kTensors] = {};
#pragma unroll
  for (int d = 2; d >= 0; d--) {
    const Index size = (Index)r.sizes[d], rest = d ? row / size : 0;
    for (int t = 0; t < Rotary::kTensors; t++) at[t] += (int64_t)(row - rest * size) * r.strides[t][d];
    row = rest;
  }
  const auto* x = (const Bits*)r.x + at[Rotary::kX];
  const auto* cos = (const Bits*)r.cos + at[Rotary::kCos];
  const auto* sin = (const Bits*)r.sin + at[Rotary::kSin];
  auto* y = (Bits*)r.y + at[Rotary::kY];
  const auto a = widened<dtype>(load<n>(x + i)), b = widened<dtype>(load<n>(x + j));
  const auto cos_a = widened<dtype>(load<n>(cos + i)), cos_b = widened<dtype>(load<n>(cos + j));
  const auto sin_a = widened<dtype>(load<n>(sin + i)), sin_b = widened<dtype>(load<n>(sin + j));
  Pack<float, n> first, second;
  for (int e = 0; e < n; e++) {
    const float turn_a = r.transposed ? b.at[e] * sin_b.at[e] : -(b.at[e] * sin_a.at[e]);
    const float turn_b = r.transposed ? -(a.at[e] * sin_a.at[e]) : a.at[e] * sin_b.at[e];
    first.at[e] = a.at[e] * cos_a.at[e] + turn_a;
    second.at[e] = b.at[e] * cos_b.at[e] + turn_b;
  }
  store(y + i, narrowed<dtype>(first));
  store(y + j, narrowed<dtype>(second));
}

template <Dtype dtype>
bool aligned(const Rotary& r) {
  bool result = r.half % kWide<dtype> == 0;
  for (const void* pointer : {r.x, r.cos, r.sin, (const void*)r.y}) result = result && aligned_to_16(pointer);
  for (const auto& strides : r.strides) {
    for (const int64_t stride : strides) result = result && stride % kWide<dtype> == 0;
  }
  return result;
}

}  // namespace

int rotary_cuda(const Rotary& r, void* stream) {
  if (r.rows == 0) return cudaSuccess;
  return with_dtype(r.dtype, [&](auto type) -> int {
    constexpr Dtype dtype = type.value;
    constexpr int wide = kWide<dtype>;
    const bool packs = aligned<dtype>(r);
    const int64_t count = r.rows * (r.half / (packs ? wide : 1));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)((count + kThreads - 1) / kThreads));
    config.blockDim = dim3(kThreads);
    config.stream = (cudaStream_t)stream;
    if (count > INT32_MAX) {
      return cudaLaunchKernelEx(&config, packs ? rotary_kernel<dtype, wide, int64_t> : rotary_kernel<dtype, 1, int64_t>,
                                r, count);
    }
    return cudaLaunchKernelEx(&config, packs ? rotary_kernel<dtype, wide, uint32_t> : rotary_kernel<dtype, 1, uint32_t>,
                              r, (uint32_t)count);
  });
}

}  // namespace entrenar
