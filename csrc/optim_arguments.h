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

inline float* floats(const Tensor& tensor, const char* name, const Tensor& params) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " must be float32");
  check_on(tensor, name, params);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

inline const Codebook* codebook(const Tensor& tensor, const Tensor& params) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == kCodebookWords,
                  "codebooks must be float32, ", kCodebookWords, " each");
  check_on(tensor, "codebooks", params);
  return static_cast<const Codebook*>(tensor.const_data_ptr());
}

// The tensors in which parameters that follow each other have their states: one of steps, which says by its size how many
// they are, and one of each state, where each parameter begins with a block.
class Bucket {
 public:
  Bucket(const OptimCall& call, const Tensors& states, const Tensors& absmaxes, const Tensors& steps, size_t index,
         const Tensor& params)
      : call_(call), steps_(floats(steps[index], "steps", params)), count_(steps[index].numel()) {
    for (int k = 0; k < call.states; k++) {
      const Tensor& state = states[k * steps.size() + index];
      STD_TORCH_CHECK(state.scalar_type() == states[0].scalar_type(), "states must have one dtype");
      check_on(state, "states", params);
      states_[k] = static_cast<char*>(state.mutable_data_ptr());
      sizes_[k] = state.numel();
      element_bytes_ = state.element_size();
      if (!call.codes) continue;
      const Tensor& absmax = absmaxes[k * steps.size() + index];
      absmaxes_[k] = floats(absmax, "absmaxes", params);
      absmax_sizes_[k] = absmax.numel();
    }
  }

  bool full() const { return taken_ == count_; }

  // Gives a parameter its place.
  void take(OptimTensor& tensor) {
    tensor.step = steps_ + taken_++;
    for (int k = 0; k < call_.states; k++) {
      tensor.states[k] = states_[k] + blocks_ * kCodeBlock * element_bytes_;
      tensor.absmaxes[k] = call_.codes ? absmaxes_[k] + blocks_ : nullptr;
    }
    end_ = blocks_ * kCodeBlock + tensor.size;
    blocks_ += code_blocks(tensor.size);
  }

  // The last block may be shorter.
  void check_sizes() const {
    for (int k = 0; k < call_.states; k++) {
      STD_TORCH_CHECK(sizes_[k] == end_ || sizes_[k] == blocks_ * kCodeBlock, "states must have the sizes of params");
      STD_TORCH_CHECK(!call_.codes || absmax_sizes_[k] == blocks_, "absmaxes must have one element for each block of ",
                      kCodeBlock, " elements");
    }
  }

 private:
  const OptimCall& call_;
  float* steps_;
  int64_t count_, taken_ = 0, blocks_ = 0, end_ = 0;
  char* states_[kMaxStates];
  float* absmaxes_[kMaxStates];
  int64_t element_bytes_, sizes_[kMaxStates], absmax_sizes_[kMaxStates];
};

// `states` holds the tensors of the first state, then those of the second; so does `absmaxes`, where the states are codes.
inline OptimWork optim_work(Rule rule, const Tensors& params, const Tensors& grads, const Tensors& states,
                            const Tensors& absmaxes, const Tensors& steps, const Tensors& codebooks,
                            const std::optional<Tensor>& factor, bool stochastic) {
  const size_t count = params.size(), buckets = steps.size();
  STD_TORCH_CHECK(grads.size() == count, "params and grads must be lists of one length");
  const size_t per_param = buckets ? states.size() / buckets : 0;
  OptimWork work = {};
  OptimCall& call = work.call;
  if (count == 0) return work;
  const size_t least = rule == kSGD ? 0 : rule == kAdam ? 2 : 1, most = rule == kAdam ? 2 : 1;
  STD_TORCH_CHECK(states.size() == per_param * buckets && per_param >= least && per_param <= most,
                  "states must be a list of ", most, " for each of steps");
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
  if (factor) {
    STD_TORCH_CHECK(factor->numel() == 1, "factor must be a scalar");
    call.factor = floats(*factor, "factor", params[0]);
  }

  work.tensors.reserve(count);
  size_t i = 0;
  for (size_t index = 0; index < buckets; index++) {
    Bucket bucket(call, states, absmaxes, steps, index, params[0]);
    for (; !bucket.full(); i++) {
      STD_TORCH_CHECK(i < count, "steps must have one element for each of params");
      const Tensor& param = params[i];
      STD_TORCH_CHECK(float_dtype_of(param, "params") == call.dtype, "params must have one dtype");
      check_on(param, "params", params[0]);
      check_like(grads[i], "grads", param);
      check_on(grads[i], "grads", params[0]);
      OptimTensor tensor = {};
      tensor.param = param.mutable_data_ptr();
      tensor.grad = grads[i].const_data_ptr();
      tensor.size = param.numel();
      bucket.take(tensor);
      work.tensors.push_back(tensor);
    }
    bucket.check_sizes();
  }
  STD_TORCH_CHECK(i == count, "steps must have one element for each of params");
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
