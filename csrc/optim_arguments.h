// The arguments of the optimizers' ops, checked.
#pragma once

#include <optional>
#include <vector>

#include "arguments.h"
#include "grad_norm.h"
#include "optim_step.h"

namespace entrenar {

using Tensors = std::vector<Tensor>;

// A step of many tensors.
struct OptimWork {
  OptimCall call;
  std::vector<OptimTensor> tensors;
};

inline void check_on(const Tensor& tensor, const char* name, const Tensor& params) {
  check_device(tensor, name, params);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline float* optim_scalar(Tensor& tensor, const char* name, const Tensor& params) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == 1, name, " must be float32 scalars");
  check_on(tensor, name, params);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline const Codebook* codebook(const Tensor& tensor, const Tensor& params) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == kCodebookWords,
                  "codebooks must be float32, ", kCodebookWords, " each");
  check_on(tensor, "codebooks", params);
  return static_cast<const Codebook*>(tensor.const_data_ptr());
}

// `states` holds the first state of every parameter, then the second of every one; so does `absmaxes`, where the states
// are codes.
inline OptimWork optim_work(Rule rule, Tensors& params, const Tensors& grads, Tensors& states, Tensors& absmaxes,
                            Tensors& steps, const Tensors& codebooks, std::optional<Tensor>& factor, bool stochastic) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && steps.size() == count, "params, grads and steps must be lists of one length");
  const size_t per_param = count ? states.size() / count : 0;
  OptimWork work = {};
  OptimCall& call = work.call;
  if (count == 0) return work;
  const size_t least = rule == kSGD ? 0 : rule == kAdam ? 2 : 1, most = rule == kAdam ? 2 : 1;
  STD_TORCH_CHECK(states.size() == per_param * count && per_param >= least && per_param <= most,
                  "states must be a list of ", most, " for each of params");
  call.rule = rule;
  call.states = static_cast<int>(per_param);
  call.dtype = float_dtype_of(params[0], "params");
  call.codes = per_param && states[0].scalar_type() == ScalarType::Byte;
  call.state_dtype = per_param && !call.codes ? float_dtype_of(states[0], "states") : kFloat32;
  call.stochastic = stochastic && call.dtype == kBFloat16;
  STD_TORCH_CHECK(call.state_dtype == kFloat32 || call.state_dtype == call.dtype,
                  "states must be uint8, float32 or of the dtype of params");
  STD_TORCH_CHECK(absmaxes.size() == (call.codes ? states.size() : 0), "absmaxes must be a list of one for each of states");
  STD_TORCH_CHECK(codebooks.size() == (call.codes ? per_param : 0), "codebooks must be a list of one for each state");
  for (size_t k = 0; k < codebooks.size(); k++) call.codebooks[k] = codebook(codebooks[k], params[0]);
  if (factor) call.factor = optim_scalar(*factor, "factor", params[0]);

  work.tensors.reserve(count);
  for (size_t i = 0; i < count; i++) {
    Tensor& param = params[i];
    STD_TORCH_CHECK(float_dtype_of(param, "params") == call.dtype, "params must have one dtype");
    check_on(param, "params", params[0]);
    check_like(grads[i], "grads", param);
    check_on(grads[i], "grads", params[0]);
    OptimTensor tensor = {};
    tensor.param = param.mutable_data_ptr();
    tensor.grad = grads[i].const_data_ptr();
    tensor.size = param.numel();
    tensor.step = optim_scalar(steps[i], "steps", params[0]);
    for (size_t k = 0; k < per_param; k++) {
      Tensor& state = states[k * count + i];
      STD_TORCH_CHECK(state.scalar_type() == states[0].scalar_type(), "states must have one dtype");
      STD_TORCH_CHECK(state.numel() == tensor.size, "states must have the sizes of params");
      check_on(state, "states", params[0]);
      tensor.states[k] = state.mutable_data_ptr();
      if (!call.codes) continue;
      Tensor& absmax = absmaxes[k * count + i];
      STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float && absmax.numel() == code_blocks(tensor.size),
                      "absmaxes must be float32, one for each block of ", kCodeBlock, " elements");
      check_on(absmax, "absmaxes", params[0]);
      tensor.absmaxes[k] = static_cast<float*>(absmax.mutable_data_ptr());
    }
    work.tensors.push_back(tensor);
  }
  return work;
}

inline std::vector<NormTensor> norm_tensors(const Tensors& grads) {
  STD_TORCH_CHECK(!grads.empty(), "grads must not be empty");
  std::vector<NormTensor> tensors;
  for (const Tensor& grad : grads) {
    check_on(grad, "grads", grads[0]);
    const Dtype dtype = float_dtype_of(grad, "grads");
    if (grad.numel()) tensors.push_back({grad.const_data_ptr(), grad.numel(), dtype});
  }
  return tensors;
}

// Both devices register these ops; `step` does the work: step(work, settings, params[0]).
template <void (*step)(const OptimWork&, const OptimSettings&, const Tensor&)>
struct OptimOps {
  static void run(const OptimSettings& s, Tensors& params, const Tensors& grads, Tensors& states, Tensors& absmaxes,
                  Tensors& steps, const Tensors& codebooks, std::optional<Tensor>& factor, bool stochastic) {
    const OptimWork work = optim_work(s.rule, params, grads, states, absmaxes, steps, codebooks, factor, stochastic);
    if (!work.tensors.empty()) step(work, s, params[0]);
  }

  static void sgd_(Tensors params, Tensors grads, Tensors states, Tensors absmaxes, Tensors steps, Tensors codebooks,
                   std::optional<Tensor> factor, std::optional<int64_t> seed, double lr, double momentum,
                   double dampening, double weight_decay, bool nesterov, bool maximize) {
    OptimSettings s = {};
    s.rule = kSGD;
    s.nesterov = nesterov;
    s.maximize = maximize;
    s.lr = lr;
    s.beta1 = momentum;
    s.beta2 = dampening;
    s.weight_decay = weight_decay;
    s.seed = seed.value_or(0);
    run(s, params, grads, states, absmaxes, steps, codebooks, factor, seed.has_value());
  }

  static void adam_(Tensors params, Tensors grads, Tensors states, Tensors absmaxes, Tensors steps, Tensors codebooks,
                    std::optional<Tensor> factor, std::optional<int64_t> seed, double lr, double beta1, double beta2,
                    double eps, double weight_decay, bool decoupled, bool maximize) {
    OptimSettings s = {};
    s.rule = kAdam;
    s.decoupled = decoupled;
    s.maximize = maximize;
    s.lr = lr;
    s.beta1 = beta1;
    s.beta2 = beta2;
    s.eps = eps;
    s.weight_decay = weight_decay;
    s.seed = seed.value_or(0);
    run(s, params, grads, states, absmaxes, steps, codebooks, factor, seed.has_value());
  }

  static void lion_(Tensors params, Tensors grads, Tensors states, Tensors absmaxes, Tensors steps, Tensors codebooks,
                    std::optional<Tensor> factor, std::optional<int64_t> seed, double lr, double beta1, double beta2,
                    double weight_decay, bool maximize) {
    OptimSettings s = {};
    s.rule = kLion;
    s.decoupled = true;
    s.maximize = maximize;
    s.lr = lr;
    s.beta1 = beta1;
    s.beta2 = beta2;
    s.weight_decay = weight_decay;
    s.seed = seed.value_or(0);
    run(s, params, grads, states, absmaxes, steps, codebooks, factor, seed.has_value());
  }
};

}  // namespace entrenar
