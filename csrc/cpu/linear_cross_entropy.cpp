// Cross-entropy of a linear map's result and its gradient, a tile of classes at a time.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../arguments.h"
#include "../cross_entropy.h"
#include "dispatch.h"
#include "targets.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

// So many that packing the classes for them costs little, and so few that their sums stay in the second-level cache.
constexpr int64_t kRowsAtOnce = 512, kRowStep = 32;

std::tuple<Tensor, Tensor> linear_cross_entropy_rows(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                     int64_t ignore_index, bool wants_dx) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "x and weight must be matrices with as many columns");
  const Tensor from = packed(x), classes = packed(weight), t = packed(target);
  LinearCrossEntropy p = {};
  p.dtype = dtype_of(from, "x");
  STD_TORCH_CHECK(dtype_of(classes, "weight") == p.dtype, "weight must have the dtype of x");
  const int64_t rows = x.size(0);
  p.columns = x.size(1), p.classes = weight.size(0);
  p.x = from.const_data_ptr(), p.weight = classes.const_data_ptr();
  p.targets = targets_of(t, x);
  check_targets(p.targets, rows, p.classes, ignore_index);
  p.ignore_index = ignore_index;
  Tensor losses = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  Tensor dx = wants_dx ? empty_as(x) : torch::stable::new_empty(x, {0});
  p.losses = losses.mutable_data_ptr<float>();
  if (wants_dx) p.dx = dx.mutable_data_ptr();

  const int64_t threads = torch::stable::get_num_threads(), share = (rows + threads - 1) / threads;
  const int64_t step = std::min(kRowsAtOnce, (share + kRowStep - 1) / kRowStep * kRowStep);
  parallel_for(0, (rows + step - 1) / std::max<int64_t>(1, step), 1, [&](int64_t begin, int64_t end) {
    static thread_local Workspace scratch;
    const Kernels& k = kernels();
    for (int64_t row = begin * step; row < std::min(rows, end * step); row += step) {
      const int64_t until = std::min(rows, row + step);
      k.linear_cross_entropy(&p, row, until, scratch.reserve(k.linear_cross_entropy_bytes(&p, until - row)));
    }
  });
  return {losses, dx};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&linear_cross_entropy_rows));
}

}  // namespace entrenar
