// The device of a tensor, and the stream that torch uses on it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#if defined(ENTRENAR_EMULATED)
#define ENTRENAR_DEVICE CPU  // the emulator runs kernels on the CPU's tensors
#else
#define ENTRENAR_DEVICE CUDA
#endif

// It lives in libtorch_cuda.so, which a CPU build of torch lacks: a strong reference would fail when this is loaded.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

// Of the CUDA runtime, whose headers are for files that nvcc compiles.
extern "C" const char* cudaGetErrorName(int error);

namespace entrenar {

#if defined(ENTRENAR_EMULATED)

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
  void check(int launched) const { STD_TORCH_CHECK(launched == 0, "the kernel was not launched"); }
};

#else

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this build of torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

  void check(int launched) const {
    STD_TORCH_CHECK(launched == 0, "the kernel was not launched: ", cudaGetErrorName(launched));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

}  // namespace entrenar
