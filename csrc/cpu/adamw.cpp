// adamw_: one AdamW step of many parameters, spread over threads by their elements.
#include "../adamw_arguments.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dispatch.h"

namespace entrenar {

namespace {

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, int64_t step, double lr, double beta1,
            double beta2, double eps, double weight_decay) {
  const std::vector<AdamWTensor> tensors = adamw_tensors(params, grads, exp_avgs, exp_avg_sqs);
  if (tensors.empty()) return;
  const Dtype dtype = float_dtype_of(params[0], "params");
  const AdamWStep s = adamw_step(step, lr, beta1, beta2, eps, weight_decay);
  std::vector<int64_t> begins = {0};  // of each tensor, among the elements of all
  for (const AdamWTensor& tensor : tensors) begins.push_back(begins.back() + tensor.size);

  const Kernels& k = kernels();
  torch::stable::parallel_for(0, begins.back(), kElementsToSplit, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
    for (; i < tensors.size() && begins[i] < end; i++) {
      k.adamw(&s, dtype, &tensors[i], std::max(begin, begins[i]) - begins[i], std::min(end, begins[i + 1]) - begins[i]);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_)); }

}  // namespace entrenar
