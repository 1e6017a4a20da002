// Normalization of rows, and its gradients, with float32 statistics that the gradients compute anew.
#include "norm.h"

#include "rows.h"

namespace entrenar {

namespace {

// Packs of a row that a thread holds: fewer where it holds two rows, the next two and sums over rows for each column.
constexpr int kHeld = 4, kHeldBackward = 2;

template <Dtype dtype>
using Bits = typename Float<dtype>::Bits;

template <Dtype dtype, int n, int held>
__global__ void __launch_bounds__(kMaxTeam, 1) rms_norm_kernel(RMSNorm norm) {
  const int64_t row = team(), columns = norm.columns;
  if (row >= norm.rows) return;
  RowPart<dtype, n, held> x(norm.x, row, columns);
  const Weights<dtype, n, held> weights(norm.weight, columns);
  if (norm.residual) {
    const RowPart<dtype, n, held> residual(norm.residual, row, columns);
    auto* sum = (Bits<dtype>*)norm.sum + row * columns;
    for_packs<n, held>(columns, [&](int p, int64_t i) {
      Pack<float, n> values = x.at(p, i);
      const Pack<float, n> others = residual.at(p, i);
      for (int e = 0; e < n; e++) values.at[e] += others.at[e];
      x.put(sum, p, i, values);
    });
    x.read_from(sum);
  }
  float squares[1] = {};
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    for (const float value : x.at(p, i).at) squares[0] += value * value;
  });
  team_sum(squares, 0);
  const float r = rsqrtf(squares[0] / columns + norm.eps);
  auto* y = (Bits<dtype>*)norm.y + row * columns;
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    Pack<float, n> values = x.at(p, i);
    const Pack<float, n> w = weights.at(p, i);
    for (int e = 0; e < n; e++) values.at[e] *= r * w.at[e];
    store(y + i, narrowed<dtype>(values));
  });
}

// Sums over rows are taken in chunks of rows, whose number does not depend on the device, and then added up in order.
// On an H200, 2048 rows of 4096 take 10 to 20 % more time in half or twice as many.
constexpr int64_t kMaxChunks = 256, kMinChunkRows = 1;

int64_t chunk_rows_of(int64_t rows) { return std::max((rows + kMaxChunks - 1) / kMaxChunks, kMinChunkRows); }
int64_t chunks_of(int64_t rows) { return (rows + chunk_rows_of(rows) - 1) / chunk_rows_of(rows); }

// What a team adds up of each column over its rows: in registers, or in memory where the rows are not held.
template <int n, int held>
class ColumnSums {
 public:
  __device__ explicit ColumnSums(float* to) : to_(to) {}

  __device__ void start(int64_t columns) {
    for_packs<n, held>(columns, [&](int p, int64_t i) {
      for (int e = 0; e < n; e++) at(p, i)[e] = 0.0f;
    });
  }

  __device__ float* at(int p, int64_t i) {
    if constexpr (held > 0) {
      return sums_[p].at;
    } else {
      return to_ + i;
    }
  }

  __device__ void finish(int64_t columns) {
    if constexpr (held > 0) for_packs<n, held>(columns, [&](int p, int64_t i) { store(to_ + i, sums_[p]); });
  }

 private:
  float* to_;
  Pack<float, n> sums_[held > 0 ? held : 1];
};

// total / columns with inverse = 1 / columns, rounded as the division is where total is finite.
__device__ float mean_of(float total, float columns, float inverse) {
  const float mean = total * inverse;
  return fmaf(fmaf(-mean, columns, total), inverse, mean);
}

// dx of a row, and with `summing` its terms of dw and db, both wanted or not.
template <bool centred, bool summing, Dtype dtype, int n, int held>
__device__ void backward_of_row(const NormBackward& norm, int64_t row, const RowPart<dtype, n, held>& x,
                                const RowPart<dtype, n, held>& dy, const Weights<dtype, n, held>& weights,
                                ColumnSums<n, held>& dw, ColumnSums<n, held>& db, int& turn) {
  const int64_t columns = norm.columns, start = row * columns;
  const float inverse = 1.0f / columns;
  float mean = 0.0f;
  if constexpr (centred) {
    float total[1] = {};
    for_packs<n, held>(columns, [&](int p, int64_t i) {
      for (const float value : x.at(p, i).at) total[0] += value;
    });
    team_sum(total, turn++);
    mean = mean_of(total[0], columns, inverse);
  }

  float totals[centred ? 3 : 2] = {};  // of the x that is normalized: Σ x², Σ g x, and Σ g
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    const Pack<float, n> xs = x.at(p, i), dys = dy.at(p, i), w = weights.at(p, i);
    for (int e = 0; e < n; e++) {
      const float value = xs.at[e] - mean, g = __fmul_rn(dys.at[e], w.at[e]);
      totals[0] += value * value;
      totals[1] += g * value;
      if constexpr (centred) totals[2] += g;
    }
  });
  team_sum(totals, turn++);
  const float r = rsqrtf(totals[0] * inverse + norm.eps);
  const float projection = r * (totals[1] * inverse);
  float mean_g = 0.0f;
  if constexpr (centred) mean_g = mean_of(totals[2], columns, inverse);

  auto* dx = (Bits<dtype>*)norm.dx + start;
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    const Pack<float, n> xs = x.at(p, i), dys = dy.at(p, i), w = weights.at(p, i);
    Pack<float, n> result = {};
    if (!centred && norm.dsum) result = widened<dtype>(load<n>((const Bits<dtype>*)norm.dsum + start + i));
    for (int e = 0; e < n; e++) {
      const float x_hat = (xs.at[e] - mean) * r;
      // Rounded as it was for its mean, so that what a row has in common cancels: r may be large where rows are constant.
      const float g = __fmul_rn(dys.at[e], w.at[e]);
      result.at[e] += r * (g - mean_g - x_hat * projection);
      if constexpr (summing) {
        dw.at(p, i)[e] += dys.at[e] * x_hat;
        if constexpr (centred) db.at(p, i)[e] += dys.at[e];
      }
    }
    store(dx + i, narrowed<dtype>(result));
  });
}

// A row for each team; with `summing` a chunk of rows, and its sums to sums[0, chunk] (dw) and sums[1, chunk] (db).
template <bool centred, bool summing, Dtype dtype, int n, int held>
__global__ void __launch_bounds__(kMaxTeam, 1)
    backward_kernel(NormBackward norm, int64_t chunk_rows, int64_t chunks, float* sums) {
  const int64_t chunk = team();
  if (chunk >= chunks) return;
  ColumnSums<n, held> dw(sums + chunk * norm.columns), db(sums + (chunks + chunk) * norm.columns);
  if constexpr (summing) {
    dw.start(norm.columns);
    if constexpr (centred) db.start(norm.columns);
  }
  const int64_t first = chunk * chunk_rows, end = min(norm.rows, first + chunk_rows);
  const Weights<dtype, n, held> weights(norm.weight, norm.columns);
  RowPart<dtype, n, held> next_x(norm.x, first, norm.columns), next_dy(norm.dy, first, norm.columns);
  int turn = 0;
  for (int64_t row = first; row < end; row++) {
    const auto x = next_x, dy = next_dy;
    if (summing && row + 1 < end) {  // the next row is on its way while this one is worked on
      next_x = RowPart<dtype, n, held>(norm.x, row + 1, norm.columns);
      next_dy = RowPart<dtype, n, held>(norm.dy, row + 1, norm.columns);
    }
    backward_of_row<centred, summing, dtype>(norm, row, x, dy, weights, dw, db, turn);
  }
  if constexpr (summing) {
    dw.finish(norm.columns);
    if constexpr (centred) db.finish(norm.columns);
  }
}

// A block adds up kWarp columns of the chunks: a warp takes every kWarp-th chunk, and the sums of the warps are added in
// their order. blockIdx.y says whether of dw or of db.
template <Dtype dtype>
__global__ void __launch_bounds__(kWarp * kWarp) add_sums_kernel(NormBackward norm, int64_t chunks, const float* sums) {
  auto* shared = (float*)shared_memory();
  const int64_t column = (int64_t)blockIdx.x * kWarp + threadIdx.x;
  const float* from = sums + blockIdx.y * chunks * norm.columns + column;
  float total = 0.0f;
  if (column < norm.columns) {
#pragma unroll 8
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kWarp) total += from[chunk * norm.columns];
  }
  shared[threadIdx.y * kWarp + threadIdx.x] = total;
  __syncthreads();
  void* out = blockIdx.y ? norm.db : norm.dw;
  if (threadIdx.y || column >= norm.columns || !out) return;
  total = 0.0f;
  for (int warp = 0; warp < kWarp; warp++) total += shared[warp * kWarp + threadIdx.x];
  ((Bits<dtype>*)out)[column] = Float<dtype>::narrow(total);
}

template <bool centred, bool summing, Dtype dtype>
int backward(const NormBackward& norm, float* sums, void* stream) {
  bool aligned = norm.columns % kWide<dtype> == 0;
  for (const void* pointer : {norm.dy, norm.x, norm.weight, norm.dsum, (const void*)norm.dx}) {
    aligned = aligned && aligned_to_16(pointer);
  }
  const int64_t chunk_rows = summing ? chunk_rows_of(norm.rows) : 1;
  const int64_t chunks = summing ? chunks_of(norm.rows) : norm.rows;
  int error = cudaSuccess;
  if (chunks) {
    const Teams teams = teams_for<dtype, kHeldBackward>(norm.columns, aligned);
    const cudaLaunchConfig_t config = launch_teams(teams, chunks, stream);
    error = with_teams<dtype, kHeldBackward>(teams, [&](auto n, auto held) {
      return (int)cudaLaunchKernelEx(&config, backward_kernel<centred, summing, dtype, n.value, held.value>, norm,
                                     chunk_rows, chunks, sums);
    });
  }
  if (error || !summing || norm.columns == 0) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)((norm.columns + kWarp - 1) / kWarp), centred ? 2 : 1);
  config.blockDim = dim3(kWarp, kWarp);
  config.dynamicSmemBytes = kWarp * kWarp * sizeof(float);
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, add_sums_kernel<dtype>, norm, chunks, (const float*)sums);
}

template <bool centred>
int backward(const NormBackward& n, float* sums, void* stream) {
  return with_dtype(n.dtype, [&](auto dtype) {
    return n.dw || n.db ? backward<centred, true, dtype.value>(n, sums, stream)
                        : backward<centred, false, dtype.value>(n, sums, stream);
  });
}

}  // namespace

int rms_norm_cuda(const RMSNorm& n, void* stream) {
  if (n.rows == 0) return cudaSuccess;
  return with_dtype(n.dtype, [&](auto dtype) -> int {
    bool aligned = n.columns % kWide<dtype.value> == 0;
    for (const void* pointer : {n.x, n.residual, n.weight, (const void*)n.sum, (const void*)n.y}) {
      aligned = aligned && aligned_to_16(pointer);
    }
    const Teams teams = teams_for<dtype.value, kHeld>(n.columns, aligned);
    const cudaLaunchConfig_t config = launch_teams(teams, n.rows, stream);
    return with_teams<dtype.value, kHeld>(teams, [&](auto pack, auto held) {
      return (int)cudaLaunchKernelEx(&config, rms_norm_kernel<dtype.value, pack.value, held.value>, n);
    });
  });
}

int64_t norm_sums(const NormBackward& n) { return n.dw || n.db ? 2 * chunks_of(n.rows) * n.columns : 0; }

int rms_norm_backward_cuda(const NormBackward& n, float* sums, void* stream) {
  return backward<false>(n, sums, stream);
}

int layer_norm_backward_cuda(const NormBackward& n, float* sums, void* stream) {
  return backward<true>(n, sums, stream);
}

}  // namespace entrenar
