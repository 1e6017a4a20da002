// Launches that ask for more than a grid: much shared memory, clusters, a start before the kernel before has ended.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <atomic>

namespace entrenar {

struct Device {
  int index = -1, major = 0, minor = 0, processors = 0;
  int shared_bytes = 0;  // that a block may ask for

  // Blocks form clusters, and kernels may be launched before the one before has ended.
  bool is_hopper_or_later() const { return major >= 9; }
};

// The current device. To ask for all that takes a microsecond, so each thread asks once.
inline const Device& current_device() {
  thread_local Device known[64];
  int index = 0;
  cudaGetDevice(&index);
  Device& device = known[index];
  if (device.index < 0) {
    device.index = index;
    cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
    cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  return device;
}

struct Launch {
  dim3 grid;
  unsigned threads;
  int64_t shared_bytes;
  void* stream;
  unsigned cluster = 1;    // blocks of one; more than 1 only from Hopper on
  bool dependent = false;  // the kernel begins with wait_for_kernel_before(), and is launched early where that can be
};

// Returns a cudaError_t.
template <auto kernel, class... Arguments>
int launch(const Device& device, const Launch& how, const Arguments&... arguments) {
  constexpr int64_t kUnasked = 48 << 10;  // of shared memory
  static std::atomic<uint64_t> told{0};   // the devices on which the kernel may use all shared memory
  if (how.shared_bytes > kUnasked && !(told >> device.index & 1)) {
    const int status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
    if (status != cudaSuccess) return status;
    told |= (uint64_t)1 << device.index;
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = how.grid;
  config.blockDim = dim3(how.threads);
  config.dynamicSmemBytes = (size_t)how.shared_bytes;
  config.stream = (cudaStream_t)how.stream;
  config.attrs = attributes;
  if (how.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = how.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (how.dependent && device.is_hopper_or_later()) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace entrenar
