// Normalization of rows, and its gradients, with float32 statistics that the gradients compute anew.
#include "norm.h"

#include "rows.h"

namespace entrenar {

namespace {

// Packs of a row that a thread holds: fewer where it holds two rows and two sums over rows for each column.
constexpr int kHeld = 4, kHeldBesideSums = 2;

template <Dtype dtype>
using Bits = typename Float<dtype>::Bits;

// A pack of weights, all 1 where there are none.
template <Dtype dtype, int n>
__device__ Pack<float, n> weights_at(const void* weight, int64_t i) {
  if (weight) return widened<dtype>(load<n>((const Bits<dtype>*)weight + i));
  Pack<float, n> ones;
  for (float& one : ones.at) one = 1.0f;
  return ones;
}

template <Dtype dtype, int n, int held>
__global__ void __launch_bounds__(kMaxTeam, 1) rms_norm_kernel(RMSNorm norm) {
  const int64_t row = team(), columns = norm.columns;
  if (row >= norm.rows) return;
  RowPart<dtype, n, held> x(norm.x, row, columns);
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
  team_sum(squares);
  const float r = rsqrtf(squares[0] / columns + norm.eps);
  auto* y = (Bits<dtype>*)norm.y + row * columns;
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    Pack<float, n> values = x.at(p, i);
    const Pack<float, n> w = weights_at<dtype, n>(norm.weight, i);
    for (int e = 0; e < n; e++) values.at[e] *= r * w.at[e];
    store(y + i, narrowed<dtype>(values));
  });
}

// Sums over rows are taken in chunks of rows, whose number does not depend on the device, and then added up in order.
constexpr int64_t kMaxChunks = 512, kMinChunkRows = 4;

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
    if constexpr (held > 0) {
      for_packs<n, held>(columns, [&](int p, int64_t i) {
        for (int e = 0; e < n; e++) to_[i + e] = sums_[p].at[e];
      });
    }
  }

 private:
  float* to_;
  Pack<float, n> sums_[held > 0 ? held : 1];
};

// dx of a row, and with `summing` its terms of dw and db, both wanted or not.
template <bool centred, bool summing, Dtype dtype, int n, int held>
__device__ void backward_of_row(const NormBackward& norm, int64_t row, ColumnSums<n, held>& dw, ColumnSums<n, held>& db) {
  const int64_t columns = norm.columns, start = row * columns;
  const RowPart<dtype, n, held> x(norm.x, row, columns), dy(norm.dy, row, columns);
  float mean = 0.0f;
  if constexpr (centred) {
    float total[1] = {};
    for_packs<n, held>(columns, [&](int p, int64_t i) {
      for (const float value : x.at(p, i).at) total[0] += value;
    });
    team_sum(total);
    mean = total[0] / columns;
  }

  float totals[centred ? 3 : 2] = {};  // of the x that is normalized: Σ x², Σ g x, and Σ g
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    const Pack<float, n> xs = x.at(p, i), dys = dy.at(p, i), w = weights_at<dtype, n>(norm.weight, i);
    for (int e = 0; e < n; e++) {
      const float value = xs.at[e] - mean, g = __fmul_rn(dys.at[e], w.at[e]);
      totals[0] += value * value;
      totals[1] += g * value;
      if constexpr (centred) totals[2] += g;
    }
  });
  team_sum(totals);
  const float r = rsqrtf(totals[0] / columns + norm.eps);
  const float projection = r * (totals[1] / columns);
  float mean_g = 0.0f;
  if constexpr (centred) mean_g = totals[2] / columns;

  auto* dx = (Bits<dtype>*)norm.dx + start;
  for_packs<n, held>(columns, [&](int p, int64_t i) {
    const Pack<float, n> xs = x.at(p, i), dys = dy.at(p, i), w = weights_at<dtype, n>(norm.weight, i);
    Pack<float, n> result = {};
    if (norm.dsum) result = widened<dtype>(load<n>((const Bits<dtype>*)norm.dsum + start + i));
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
  const int64_t end = min(norm.rows, (chunk + 1) * chunk_rows);
  for (int64_t row = chunk * chunk_rows; row < end; row++) {
    backward_of_row<centred, summing, dtype>(norm, row, dw, db);
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
#pragma unroll 4
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
  constexpr int packs = centred && summing ? kHeldBesideSums : kHeld;
  bool aligned = norm.columns % kWide<dtype> == 0;
  for (const void* pointer : {norm.dy, norm.x, norm.weight, norm.dsum, (const void*)norm.dx}) {
    aligned = aligned && aligned_to_16(pointer);
  }
  const int64_t chunk_rows = summing ? chunk_rows_of(norm.rows) : 1;
  const int64_t chunks = summing ? chunks_of(norm.rows) : norm.rows;
  int error = cudaSuccess;
  if (chunks) {
    const Teams teams = teams_for<dtype, packs>(norm.columns, aligned);
    const cudaLaunchConfig_t config = launch_teams(teams, chunks, stream);
    error = with_teams<dtype, packs>(teams, [&](auto n, auto held) {
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
