// Normalization of rows, and its gradients.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "dispatch.h"
#include "../arguments.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

// Rows that a task takes at least: fewer elements than kElementsToSplit stay on one thread.
int64_t rows_to_split(int64_t columns) {
  return std::max<int64_t>(1, kElementsToSplit / std::max<int64_t>(1, columns));
}

int64_t columns_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0, "x must have at least one dimension");
  return x.size(-1);
}

// The weight of rows of x, checked and contiguous; it may be absent.
std::optional<Tensor> packed_weight(const std::optional<Tensor>& weight, const Tensor& x) {
  if (!weight) return std::nullopt;
  STD_TORCH_CHECK(weight->scalar_type() == x.scalar_type() && weight->dim() == 1 && weight->size(0) == x.size(-1),
                  "weight must have ", x.size(-1), " elements of x's dtype");
  return packed(*weight);
}

// y = rms_norm(x), or of x + residual, which is written to `sum`.
Tensor normalize(const Tensor& x, const Tensor* residual, const Tensor* sum, const std::optional<Tensor>& weight,
                 double eps) {
  RMSNorm n = {};
  n.dtype = float_dtype_of(x, "x");
  n.columns = columns_of(x);
  n.eps = static_cast<float>(eps);
  const Tensor y = empty_as(x);
  n.x = x.const_data_ptr();
  const std::optional<Tensor> w = packed_weight(weight, x);
  if (w) n.weight = w->const_data_ptr();
  n.y = y.mutable_data_ptr();
  if (residual) {
    n.residual = residual->const_data_ptr();
    n.sum = sum->mutable_data_ptr();
  }
  const Kernels& k = kernels();
  parallel_for(0, n.columns ? x.numel() / n.columns : 0, rows_to_split(n.columns),
               [&](int64_t begin, int64_t end) { k.rms_norm(&n, begin, end); });
  return y;
}

Tensor rms_norm(const Tensor& x, std::optional<Tensor> weight, double eps) {
  return normalize(packed(x), nullptr, nullptr, weight, eps);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, std::optional<Tensor> weight,
                                        double eps) {
  check_like(residual, "residual", x);
  const Tensor input = packed(x), other = packed(residual);
  const Tensor sum = empty_as(input);
  const Tensor y = normalize(input, &other, &sum, weight, eps);
  return {sum, y};
}

// Sums over rows are taken in chunks of rows, whose number does not depend on the threads, and then added up in order.
constexpr int64_t kMaxChunks = 64, kMinChunkRows = 32;

// Calls rows(begin, end, dw, db) for chunks of rows, and returns the sums dw and db, empty where not wanted.
template <class Rows>
std::tuple<Tensor, Tensor> in_chunks(const Tensor& x, int64_t columns, Dtype dtype, bool needs_dw, bool needs_db,
                                     const Rows& rows_kernel) {
  static thread_local Workspace workspace;
  const int64_t rows = columns ? x.numel() / columns : 0;
  const int64_t chunk_rows = std::max((rows + kMaxChunks - 1) / kMaxChunks, kMinChunkRows);
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows, stride = sums_stride(columns);
  auto* sums = static_cast<float*>(workspace.reserve((needs_dw + needs_db) * chunks * stride * sizeof(float)));
  float* dws = needs_dw ? sums : nullptr;
  float* dbs = needs_db ? sums + needs_dw * chunks * stride : nullptr;
  parallel_for(0, chunks, (rows_to_split(columns) + chunk_rows - 1) / chunk_rows, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      rows_kernel(chunk * chunk_rows, std::min(rows, (chunk + 1) * chunk_rows), dws ? dws + chunk * stride : nullptr,
                  dbs ? dbs + chunk * stride : nullptr);
    }
  });
  const Tensor dw = torch::stable::new_empty(x, {needs_dw ? columns : 0});
  const Tensor db = torch::stable::new_empty(x, {needs_db ? columns : 0});
  if (needs_dw) kernels().add_sums(dws, chunks, columns, dtype, dw.mutable_data_ptr());
  if (needs_db) kernels().add_sums(dbs, chunks, columns, dtype, db.mutable_data_ptr());
  return {dw, db};
}

NormBackward backward_of(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& weight, double eps,
                         const Tensor& dx) {
  NormBackward n = {};
  n.dtype = float_dtype_of(x, "x");
  n.columns = x.size(-1);
  n.eps = static_cast<float>(eps);
  n.dy = dy.const_data_ptr();
  n.x = x.const_data_ptr();
  if (weight) n.weight = weight->const_data_ptr();
  n.dx = dx.mutable_data_ptr();
  return n;
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> weight,
                                             std::optional<Tensor> dsum, double eps, bool needs_dw) {
  columns_of(x);
  check_like(dy, "dy", x);
  if (dsum) check_like(*dsum, "dsum", x);
  const Tensor gradient = packed(dy), input = packed(x);
  const std::optional<Tensor> w = packed_weight(weight, x);
  const Tensor dx = empty_as(input);
  NormBackward n = backward_of(gradient, input, w, eps, dx);
  const Tensor beside = dsum ? packed(*dsum) : gradient;
  if (dsum) n.dsum = beside.const_data_ptr();
  const Kernels& k = kernels();
  const auto [dw, _] = in_chunks(
      input, n.columns, n.dtype, needs_dw, false,
      [&](int64_t begin, int64_t end, float* dw, float*) { k.rms_norm_backward(&n, begin, end, dw); });
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> weight,
                                                       double eps, bool needs_dw, bool needs_db) {
  columns_of(x);
  check_like(dy, "dy", x);
  const Tensor gradient = packed(dy), input = packed(x);
  const std::optional<Tensor> w = packed_weight(weight, x);
  const Tensor dx = empty_as(input);
  const NormBackward n = backward_of(gradient, input, w, eps, dx);
  const Kernels& k = kernels();
  const auto [dw, db] = in_chunks(
      input, n.columns, n.dtype, needs_dw, needs_db,
      [&](int64_t begin, int64_t end, float* dw, float* db) { k.layer_norm_backward(&n, begin, end, dw, db); });
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace entrenar
