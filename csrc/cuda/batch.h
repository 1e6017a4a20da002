// Many tensors in one launch: their addresses are the kernel's parameter, and its blocks are shared out among them.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>

namespace entrenar {

constexpr int kParameterBytes = 32764 - 256;  // a kernel may take so many, less what stands beside the tensors

template <class T>
struct Batch {
  static constexpr int kMost = (kParameterBytes - 16) / (sizeof(T) + sizeof(int));

  int count;
  T tensors[kMost];
  int end[kMost];  // the blocks of a tensor come before this one

  // Which tensor a block works on, if none before `low`.
  __device__ int find(int block, int low = 0) const {
    int high = count - 1;  // the first that ends after this block
    while (low < high) {
      const int middle = (low + high) / 2;
      if (end[middle] > block) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  __device__ int64_t begin(int tensor) const { return tensor ? end[tensor - 1] : 0; }
};

// launch(batch, number of its first tensor, blocks) for all tensors, with a block for each `size` elements of one, which
// may be none; stops at the first result that is not success.
template <class T, class Launch>
int in_batches(const T* tensors, int64_t count, int64_t size, const Launch& launch) {
  for (int64_t first = 0; first < count; first += Batch<T>::kMost) {
    Batch<T> batch;
    batch.count = (int)std::min<int64_t>(count - first, Batch<T>::kMost);
    int64_t blocks = 0;
    for (int i = 0; i < batch.count; i++) {
      batch.tensors[i] = tensors[first + i];
      blocks += (tensors[first + i].size + size - 1) / size;
      batch.end[i] = (int)blocks;
    }
    const int launched = launch(batch, first, blocks);
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

static inline cudaLaunchConfig_t launch_config(int64_t blocks, int threads, size_t shared_bytes, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = (cudaStream_t)stream;
  return config;
}

}  // namespace entrenar
