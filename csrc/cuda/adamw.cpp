// adamw_ on CUDA.
#include "adamw.h"

#include <torch/csrc/stable/library.h>

#include "../adamw_arguments.h"
#include "device.h"

namespace entrenar {

namespace {

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, int64_t step, double lr, double beta1,
            double beta2, double eps, double weight_decay) {
  const std::vector<AdamWTensor> tensors = adamw_tensors(params, grads, exp_avgs, exp_avg_sqs);
  if (tensors.empty()) return;
  const OnDevice device(params[0]);
  device.check(adamw_cuda(adamw_step(step, lr, beta1, beta2, eps, weight_decay), float_dtype_of(params[0], "params"),
                          tensors.data(), tensors.size(), device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, ENTRENAR_DEVICE, m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

}  // namespace entrenar
