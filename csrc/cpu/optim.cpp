// The optimizers' steps of many parameters, and the norm of their gradients, spread over threads by elements.
#include "../optim_arguments.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "dispatch.h"

namespace entrenar {

namespace {

// Tensors cut into pieces of equal size, of which the last of a tensor may be shorter.
class Pieces {
 public:
  explicit Pieces(int64_t size) : size_(size) {}

  void add(int64_t elements) { begins_.push_back(begins_.back() + (elements + size_ - 1) / size_); }
  int64_t count() const { return begins_.back(); }

  // body(tensor, first piece, end of its pieces), both counted within the tensor, for ranges that cover all.
  template <class Body>
  void parallel(const Body& body) const {
    const int64_t grain = std::max<int64_t>(1, kElementsToSplit / size_);
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(begins_.begin(), begins_.end(), begin) - begins_.begin() - 1;
      for (; i + 1 < begins_.size() && begins_[i] < end; i++) {
        body(i, std::max(begin, begins_[i]) - begins_[i], std::min(end, begins_[i + 1]) - begins_[i]);
      }
    });
  }

  int64_t begin(size_t tensor) const { return begins_[tensor]; }

 private:
  int64_t size_;
  std::vector<int64_t> begins_ = {0};
};

void step(const OptimWork& work, const OptimSettings& settings, const Tensor&) {
  if (work.call.factor && !std::isfinite(*work.call.factor)) return;
  std::vector<OptimStep> steps;
  steps.reserve(work.tensors.size());
  Pieces pieces(kCodeBlock);
  for (const OptimTensor& tensor : work.tensors) {
    const bool same = !steps.empty() && *tensor.step + 1 == *work.tensors[steps.size() - 1].step;
    *tensor.step += 1;
    steps.push_back(same ? steps.back() : optim_step(settings, *tensor.step));
    pieces.add(tensor.size);
  }
  const Kernels& k = kernels();
  pieces.parallel([&](size_t i, int64_t begin, int64_t end) {
    k.optim(&work.call, &steps[i], &work.tensors[i], begin * kCodeBlock,
            std::min(end * kCodeBlock, work.tensors[i].size));
  });
}

Tensor grad_norm(Tensors grads, double max_norm) {
  const std::vector<NormTensor> tensors = norm_tensors(grads);
  Pieces pieces(kNormPiece);
  for (const NormTensor& tensor : tensors) pieces.add(tensor.size);
  std::vector<float> sums(pieces.count());
  const Kernels& k = kernels();
  pieces.parallel([&](size_t i, int64_t begin, int64_t end) {
    const NormTensor& tensor = tensors[i];
    for (int64_t piece = begin; piece < end; piece++) {
      sums[pieces.begin(i) + piece] = k.square_sum(tensor.dtype, tensor.data, piece * kNormPiece,
                                                   std::min((piece + 1) * kNormPiece, tensor.size));
    }
  });
  double total = 0;
  for (float sum : sums) total += sum;
  Tensor result = torch::stable::new_empty(grads[0], {2}, ScalarType::Float);
  float* out = static_cast<float*>(result.mutable_data_ptr());
  out[0] = static_cast<float>(std::sqrt(total));
  out[1] = clip_factor(std::sqrt(total), max_norm);
  return result;
}

using Ops = OptimOps<step>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("sgd_", TORCH_BOX(&Ops::sgd_));
  m.impl("adam_", TORCH_BOX(&Ops::adam_));
  m.impl("lion_", TORCH_BOX(&Ops::lion_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
}

}  // namespace entrenar
