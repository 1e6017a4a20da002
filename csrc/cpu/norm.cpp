// Normalization of rows, and its gradients, on the CPU.
#include "../norm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "dispatch.h"
#include "workspace.h"

namespace entrenar {

namespace {

using torch::stable::parallel_for;

// Rows that a task takes at least: fewer elements than kElementsToSplit stay on one thread.
int64_t rows_to_split(int64_t columns) {
  return std::max<int64_t>(1, kElementsToSplit / std::max<int64_t>(1, columns));
}

void compute(const RMSNorm& n) {
  const Kernels& k = kernels();
  parallel_for(0, n.rows, rows_to_split(n.columns), [&](int64_t begin, int64_t end) { k.rms_norm(&n, begin, end); });
}

Tensor rms_norm(const Tensor& x, std::optional<Tensor> weight, double eps) {
  return rms_norm_op(x, weight, eps, compute);
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, std::optional<Tensor> weight,
                                        double eps) {
  return add_rms_norm_op(x, residual, weight, eps, compute);
}

// Sums over rows are taken in chunks of rows, whose number does not depend on the threads, and then added up in order.
constexpr int64_t kMaxChunks = 64, kMinChunkRows = 32;

// Calls rows(begin, end, dw, db) for chunks of rows, and adds up what they put into dw and db.
template <class Rows>
void in_chunks(const NormBackward& n, const Rows& rows) {
  static thread_local Workspace workspace;
  const int64_t chunk_rows = std::max((n.rows + kMaxChunks - 1) / kMaxChunks, kMinChunkRows);
  const int64_t chunks = (n.rows + chunk_rows - 1) / chunk_rows, stride = sums_stride(n.columns);
  const bool needs_dw = n.dw, needs_db = n.db;
  auto* sums = static_cast<float*>(workspace.reserve((needs_dw + needs_db) * chunks * stride * sizeof(float)));
  float* dws = needs_dw ? sums : nullptr;
  float* dbs = needs_db ? sums + needs_dw * chunks * stride : nullptr;
  parallel_for(0, chunks, (rows_to_split(n.columns) + chunk_rows - 1) / chunk_rows, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      rows(chunk * chunk_rows, std::min(n.rows, (chunk + 1) * chunk_rows), dws ? dws + chunk * stride : nullptr,
           dbs ? dbs + chunk * stride : nullptr);
    }
  });
  if (needs_dw) kernels().add_sums(dws, chunks, n.columns, n.dtype, n.dw);
  if (needs_db) kernels().add_sums(dbs, chunks, n.columns, n.dtype, n.db);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> weight,
                                             std::optional<Tensor> dsum, double eps, bool needs_dw) {
  const auto [dx, dw, _] = norm_backward_op(dy, x, weight, dsum, eps, needs_dw, false, [](const NormBackward& n) {
    in_chunks(n, [&](int64_t begin, int64_t end, float* dw, float*) {
      kernels().rms_norm_backward(&n, begin, end, dw);
    });
  });
  return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> weight,
                                                       double eps, bool needs_dw, bool needs_db) {
  return norm_backward_op(dy, x, weight, std::nullopt, eps, needs_dw, needs_db, [](const NormBackward& n) {
    in_chunks(n, [&](int64_t begin, int64_t end, float* dw, float* db) {
      kernels().layer_norm_backward(&n, begin, end, dw, db);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(entrenar, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace entrenar
