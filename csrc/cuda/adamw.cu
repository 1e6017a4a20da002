// AdamW steps of many tensors in one launch: their addresses are the kernel's parameter.
#include "adamw.h"

#include <algorithm>

#include "floats.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int64_t kBlockElements = kThreads * kPack * 2;
constexpr int kMostTensors = 640;

struct Batch {
  AdamWStep step;
  int count;
  AdamWTensor tensors[kMostTensors];
  int end[kMostTensors];  // the blocks of a tensor come before this one
};

static_assert(sizeof(Batch) <= 32764, "what a kernel's parameters may take");

template <class Bits>
__device__ bool aligned(const AdamWTensor& tensor) {
  const auto all = (uintptr_t)tensor.param | (uintptr_t)tensor.grad | (uintptr_t)tensor.exp_avg |
                   (uintptr_t)tensor.exp_avg_sq;
  return all % sizeof(Pack<Bits, kPack>) == 0;
}

template <Dtype dtype, int n>
__device__ void update(const AdamWStep& step, const AdamWTensor& tensor, int64_t index) {
  using Bits = typename Float<dtype>::Bits;
  using P = Pack<Bits, n>;
  auto& params = *(P*)((Bits*)tensor.param + index);
  auto& exp_avgs = *(P*)((Bits*)tensor.exp_avg + index);
  auto& exp_avg_sqs = *(P*)((Bits*)tensor.exp_avg_sq + index);
  const P grad = *(const P*)((const Bits*)tensor.grad + index);
  P param = params, exp_avg = exp_avgs, exp_avg_sq = exp_avg_sqs;
  for (int i = 0; i < n; i++) {
    float p = Float<dtype>::widen(param.at[i]), m = Float<dtype>::widen(exp_avg.at[i]);
    float v = Float<dtype>::widen(exp_avg_sq.at[i]);
    adamw_update(step, Float<dtype>::widen(grad.at[i]), p, m, v, [](float x) { return sqrtf(x); });
    param.at[i] = Float<dtype>::narrow(p);
    exp_avg.at[i] = Float<dtype>::narrow(m);
    exp_avg_sq.at[i] = Float<dtype>::narrow(v);
  }
  params = param;
  exp_avgs = exp_avg;
  exp_avg_sqs = exp_avg_sq;
}

template <Dtype dtype>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Batch batch) {
  const int block = blockIdx.x;
  int low = 0, high = batch.count - 1;  // the first tensor that ends after this block
  while (low < high) {
    const int middle = (low + high) / 2;
    if (batch.end[middle] > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const AdamWTensor& tensor = batch.tensors[low];
  const int64_t begin = (block - (low ? batch.end[low - 1] : 0)) * kBlockElements;
  const int64_t end = min(tensor.size, begin + kBlockElements);
  if (aligned<typename Float<dtype>::Bits>(tensor)) {
    for (int64_t i = begin + threadIdx.x * kPack; i < end; i += kThreads * kPack) {
      if (i + kPack <= end) {
        update<dtype, kPack>(batch.step, tensor, i);
      } else {
        for (int64_t j = i; j < end; j++) update<dtype, 1>(batch.step, tensor, j);
      }
    }
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) update<dtype, 1>(batch.step, tensor, i);
  }
}

}  // namespace

int adamw_cuda(const AdamWStep& step, Dtype dtype, const AdamWTensor* tensors, int64_t count, void* stream) {
  for (int64_t first = 0; first < count; first += kMostTensors) {
    Batch batch;
    batch.step = step;
    batch.count = (int)std::min<int64_t>(count - first, kMostTensors);
    int64_t blocks = 0;
    for (int i = 0; i < batch.count; i++) {
      batch.tensors[i] = tensors[first + i];
      blocks += (tensors[first + i].size + kBlockElements - 1) / kBlockElements;
      batch.end[i] = (int)blocks;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(kThreads);
    config.stream = (cudaStream_t)stream;
    const int launched = with_dtype(
        dtype, [&](auto d) { return (int)cudaLaunchKernelEx(&config, adamw_kernel<decltype(d)::value>, batch); });
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

}  // namespace entrenar
