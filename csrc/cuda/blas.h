// Matrix products by the library that torch itself calls.
#pragma once

#include <torch/csrc/stable/tensor.h>

// The C shims of aten::addmm.out. The dispatcher's stable interface cannot pass its Scalars. CUDA's lives in
// libtorch_cuda.so, which a CPU build of torch lacks: a strong reference would fail when this is loaded.
extern "C" AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                                    AtenTensorHandle mat2, double beta, double alpha)
    __attribute__((weak));
extern "C" AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                                   AtenTensorHandle mat2, double beta, double alpha);

namespace entrenar {

// out = beta self + alpha a b. With beta 0, self is not read; it may be out, or a row that is added to each of out's.
inline void addmm(torch::stable::Tensor& out, const torch::stable::Tensor& self, const torch::stable::Tensor& a,
                  const torch::stable::Tensor& b, double beta, double alpha = 1.0) {
#if defined(ENTRENAR_EMULATED)
  const auto addmm_out = aoti_torch_cpu_addmm_out;
#else
  const auto addmm_out = aoti_torch_cuda_addmm_out;
  STD_TORCH_CHECK(addmm_out, "this build of torch has no CUDA");
#endif
  TORCH_ERROR_CODE_CHECK(addmm_out(out.get(), self.get(), a.get(), b.get(), beta, alpha));
}

}  // namespace entrenar
