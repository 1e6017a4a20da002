// The arguments of adamw_, checked.
#pragma once

#include <cmath>
#include <vector>

#include "adamw.h"
#include "arguments.h"

namespace entrenar {

using Tensors = std::vector<Tensor>;

inline AdamWStep adamw_step(int64_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  AdamWStep s = {};
  s.decay = static_cast<float>(1 - lr * weight_decay);
  s.gain1 = static_cast<float>(1 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.gain2 = static_cast<float>(1 - beta2);
  s.rate = static_cast<float>(lr / (1 - std::pow(beta1, step)));
  s.root = static_cast<float>(std::sqrt(1 - std::pow(beta2, step)));
  s.eps = static_cast<float>(eps);
  return s;
}

// What is empty is left out. The four tensors of a parameter have its shape and dtype, and are contiguous.
inline std::vector<AdamWTensor> adamw_tensors(Tensors& params, const Tensors& grads, Tensors& exp_avgs,
                                              Tensors& exp_avg_sqs) {
  STD_TORCH_CHECK(grads.size() == params.size() && exp_avgs.size() == params.size() &&
                      exp_avg_sqs.size() == params.size(),
                  "params, grads, exp_avgs and exp_avg_sqs must be lists of one length");
  std::vector<AdamWTensor> tensors;
  for (size_t i = 0; i < params.size(); i++) {
    Tensor& param = params[i];
    STD_TORCH_CHECK(float_dtype_of(param, "params") == float_dtype_of(params[0], "params"),
                    "params must have one dtype");
    const Tensor* const all[] = {&param, &grads[i], &exp_avgs[i], &exp_avg_sqs[i]};
    for (const Tensor* tensor : all) {
      check_like(*tensor, "grads, exp_avgs and exp_avg_sqs", param);
      STD_TORCH_CHECK(tensor->is_contiguous(), "params, grads, exp_avgs and exp_avg_sqs must be contiguous");
      STD_TORCH_CHECK(tensor->get_device_index() == params[0].get_device_index(), "all tensors must be on one device");
    }
    if (param.numel() == 0) continue;
    tensors.push_back({param.mutable_data_ptr(), grads[i].const_data_ptr(), exp_avgs[i].mutable_data_ptr(),
                       exp_avg_sqs[i].mutable_data_ptr(), param.numel()});
  }
  return tensors;
}

}  // namespace entrenar
