// The norm of many gradients: squares summed by pieces, then the pieces by one block, always in the same order.
#include "batch.h"
#include "floats.h"
#include "optim.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256, kNormThreads = 1024;
constexpr int kPack = 4;

template <Dtype dtype>
__device__ void add_square(float& sum, typename Float<dtype>::Bits bits) {
  const float value = Float<dtype>::widen(bits);
  sum += value * value;
}

template <Dtype dtype>
__device__ float squares_of(const void* data, int64_t begin, int64_t end) {
  using Bits = typename Float<dtype>::Bits;
  using P = Pack<Bits, kPack>;
  const auto* from = (const Bits*)data + begin;
  const int count = (int)(end - begin);
  float sum = 0;
  if ((uintptr_t)data % sizeof(P) == 0) {
    constexpr int kPacks = kNormPiece / (kThreads * kPack);
    const int whole = count / kPack, rest = whole * kPack + (int)threadIdx.x;
    P packs[kPacks] = {};  // all are on their way at once
#pragma unroll
    for (int k = 0; k < kPacks; k++) {
      const int at = k * kThreads + threadIdx.x;
      if (at < whole) packs[k] = ((const P*)from)[at];
    }
#pragma unroll
    for (int k = 0; k < kPacks; k++) {
      for (int j = 0; j < kPack; j++) add_square<dtype>(sum, packs[k].at[j]);
    }
    if (rest < count) add_square<dtype>(sum, from[rest]);
  } else {
    for (int i = threadIdx.x; i < count; i += kThreads) add_square<dtype>(sum, from[i]);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Batch<NormTensor> batch, float* sums) {
  const int number = batch.find(blockIdx.x);
  const NormTensor& tensor = batch.tensors[number];
  const int64_t begin = (blockIdx.x - batch.begin(number)) * kNormPiece;
  const int64_t end = min(tensor.size, begin + kNormPiece);
  float sum;
  switch (tensor.dtype) {
    case kFloat32: sum = squares_of<kFloat32>(tensor.data, begin, end); break;
    case kBFloat16: sum = squares_of<kBFloat16>(tensor.data, begin, end); break;
    default: sum = squares_of<kFloat16>(tensor.data, begin, end); break;
  }
  sum = warp_sum(sum);
  auto* shared = (float*)shared_memory();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  float total = 0;
  for (int i = 0; i < kThreads / kWarp; i++) total += shared[i];
  sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kNormThreads)
    norm_kernel(const float* sums, int64_t pieces, double max_norm, float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kNormThreads) sum += sums[i];
  auto* shared = (double*)shared_memory();
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kNormThreads / 2; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x) return;
  const double norm = ::sqrt(shared[0]);
  out[0] = (float)norm;
  out[1] = clip_factor(norm, max_norm);
}

}  // namespace

int grad_norm_cuda(const NormTensor* tensors, int64_t count, double max_norm, float* sums, float* out, void* stream) {
  int64_t pieces = 0;
  const int launched =
      in_batches(tensors, count, kNormPiece, [&](const Batch<NormTensor>& batch, int64_t, int64_t blocks) {
        const cudaLaunchConfig_t config = launch_config(blocks, kThreads, kThreads / kWarp * sizeof(float), stream);
        if (blocks == 0) return (int)cudaSuccess;
        float* const to = sums + pieces;
        pieces += blocks;
        return (int)cudaLaunchKernelEx(&config, squares_kernel, batch, to);
      });
  if (launched != cudaSuccess) return launched;
  const cudaLaunchConfig_t config = launch_config(1, kNormThreads, kNormThreads * sizeof(double), stream);
  const float* const read = sums;
  return (int)cudaLaunchKernelEx(&config, norm_kernel, read, pieces, max_norm, out);
}

}  // namespace entrenar
