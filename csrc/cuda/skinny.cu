// Products in bfloat16 with an adapter's rank for one side. Which column or row of a step is which of an instruction is
// free, as long as both matrices agree, so that each lane may feed the tensor cores what it read in one piece.
#include "skinny.h"

#include <algorithm>

#include "async.h"
#include "cluster.h"
#include "dependent.h"
#include "floats.h"
#include "launch.h"
#include "mma.h"

namespace entrenar {

namespace {

using BFloat16 = Float<kBFloat16>;
using Octet = Pack<uint32_t, 4>;  // 8 elements of a row
using Sums = Pack<float, 4>;

constexpr int kMostTiles = 4;         // whose sums fit a kernel's registers: more ranks are as many passes
constexpr int kWarps = 8;             // of a block
constexpr int kThreads = kWarps * kWarp;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_wide(const uint16_t* memory, int64_t columns) { return (uintptr_t)memory % 16 == 0 && columns % 8 == 0; }
bool is_wide(const Projection& p) { return is_wide(p.x, p.columns) && is_wide(p.factor, p.columns); }
bool is_wide(const OuterProduct& p) { return is_wide(p.x, p.columns); }

// Of 8 elements the first `count`, and zeros. Where memory is `wide`, that is every row begins at a multiple of 16
// bytes, there are all or none.
template <bool wide>
__device__ __forceinline__ Octet load_octet(const uint16_t* from, int64_t count) {
  Octet octet = {};
  if constexpr (wide) {
    if (count > 0) octet = *(const Octet*)from;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i < count) octet.at[i / 2] |= (uint32_t)from[i] << i % 2 * 16;
    }
  }
  return octet;
}

// f(i, sum) for each i below n, by one thread of the cluster: the sum over the warps of each block of the cluster, and
// then over the blocks, of partial[warp * n + i]. Sums lie as lanes hold them, four at a time: in the order of the
// result they would lie 16 to a bank.
template <class F>
__device__ __forceinline__ void sum_over_cluster(Sums* partial, int n, int blocks, const F& f) {
  const auto add = [](Sums& sum, const Sums& term) {
#pragma unroll
    for (int v = 0; v < 4; v++) sum.at[v] += term.at[v];
  };
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads) {
    Sums sum = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) add(sum, partial[warp * n + i]);
    if (blocks == 1) {
      f(i, sum);
    } else {
      partial[i] = sum;
    }
  }
  if (blocks == 1) return;
  cluster_barrier();
  for (int i = blockIdx.x % blocks * kThreads + threadIdx.x; i < n; i += blocks * kThreads) {
    Sums sum = {};
#pragma unroll 8
    for (int block = 0; block < blocks; block++) add(sum, of_block(partial, block)[i]);
    f(i, sum);
  }
  cluster_barrier();  // the others still read
}

constexpr int kMostAtOnce = 16;  // factors, or products, of a launch

struct Factors {
  Factor each[kMostAtOnce];
};

// The products of a launch, each with blocks of its own.
template <class Product>
struct Together {
  Product each[kMostAtOnce];
  int count = 0;
  int64_t most_rank = 0, most_columns = 0;
  bool wide = true;  // all memory that is read is

  Together(const Product* products, int64_t product_count) {
    for (; count < std::min<int64_t>(product_count, kMostAtOnce); count++) {
      const Product& p = each[count] = products[count];
      most_rank = std::max(most_rank, p.rank);
      most_columns = std::max(most_columns, p.columns);
      wide &= is_wide(p);
    }
  }
};

__global__ void round_kernel(const __grid_constant__ Factors factors) {
  const Factor& f = factors.each[blockIdx.y];
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= f.rank * f.columns) return;
  f.out[i] = BFloat16::narrow(f.from[f.transposed ? i % f.columns * f.rank + i / f.columns : i]);
}

struct Project {
  Together<Projection> all;
  int64_t rows;
  float scale;
  int split;  // blocks of a cluster, over the columns
};

// The steps that a warp has on the way, in shared memory: of each, every lane has `octets`, which it alone writes and
// reads, so that warps never wait for each other.
template <int octets, int steps>
class Ahead {
 public:
  static constexpr int kBytes = kWarps * steps * octets * kWarp * (int)sizeof(Octet);  // of a block

  // Begins to load an octet of the next step, as load_octet does.
  template <bool wide>
  __device__ __forceinline__ void load(int i, const uint16_t* from, int64_t count) const {
    if constexpr (wide) {
      copy_async<16>(at_ + i * kWarp, from, count > 0);
    } else {
      at_[i * kWarp] = load_octet<false>(from, count);
    }
  }
  __device__ __forceinline__ void advance() {
    group_copies();
    at_ += octets * kWarp;
    if (at_ == end_) at_ = first_;
  }

  // The oldest step: the next is to take its place.
  __device__ __forceinline__ void take(Octet (&oldest)[octets]) const {
    wait_for_groups<steps - 1>();
#pragma unroll
    for (int i = 0; i < octets; i++) oldest[i] = at_[i * kWarp];
  }
  __device__ __forceinline__ void end() const { wait_for_groups<0>(); }

 private:
  Octet* first_ = (Octet*)shared_memory() + threadIdx.x / kWarp * (steps * octets * kWarp) + threadIdx.x % kWarp;
  Octet* end_ = first_ + steps * octets * kWarp;
  Octet* at_ = first_;
};

constexpr int kStep = 64;  // columns
constexpr int kRowTiles = 2;
constexpr int kProjectRows = 16 * kRowTiles;
constexpr int kRowOctets = 2 * kRowTiles;  // of a lane in half a step
template <int tiles>
constexpr int kStepsAhead = tiles <= 2 ? 2 : 1;
template <int tiles>
using ProjectAhead = Ahead<kRowOctets + tiles, 2 * kStepsAhead<tiles>>;

// A block's warps share 32 rows of x and 8 * tiles ranks; each takes every 8th step of its block's part of the columns,
// so that they read pieces of rows that lie side by side. With 4096 columns and rank 16 an H200 takes 5 us for up to 64
// rows and 13.6 us for 4096, whose bytes alone take 8; with blocks of 128 rows, a warp for each 16, it takes 18.
template <int tiles, bool wide>
__global__ void __launch_bounds__(kThreads, wide ? 2 : 1) project_kernel(const __grid_constant__ Project p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int part = blockIdx.x % p.split;
  const int64_t first_row = (int64_t)(blockIdx.x / p.split) * kProjectRows;
  const int64_t first_rank = (int64_t)blockIdx.y * 8 * tiles;
  const Projection projection = p.all.each[blockIdx.z];
  if (first_rank >= projection.rank) return;
  const int64_t columns = projection.columns, steps = (columns + kStep - 1) / kStep;
  const int first = (int)(steps * part / p.split), end = (int)(steps * (part + 1) / p.split);

  // A lane reads rows 8i + g and ranks 8j + g, of half a step columns 8t to 8t + 7.
  constexpr int kOctets = kRowOctets + tiles;
  ProjectAhead<tiles> ahead;
  const uint16_t* from[kOctets];  // past the last row and rank, that is read again: what comes of it is not stored
#pragma unroll
  for (int i = 0; i < kRowOctets; i++) from[i] = projection.x + min(first_row + 8 * i + g, p.rows - 1) * columns;
#pragma unroll
  for (int j = 0; j < tiles; j++) {
    from[kRowOctets + j] = projection.factor + min(first_rank + 8 * j + g, projection.rank - 1) * columns;
  }
  const auto load = [&](int step, int half) {
    const int64_t column = (int64_t)step * kStep + 32 * half + 8 * t, count = step < end ? columns - column : 0;
#pragma unroll
    for (int i = 0; i < kOctets; i++) ahead.template load<wide>(i, from[i] + column, count);
    ahead.advance();
  };

  for (int i = 0; i < 2 * kStepsAhead<tiles>; i++) load(first + warp + i / 2 * kWarps, i % 2);
  float sums[tiles][kRowTiles][4] = {};
  for (int step = first + warp; step < end; step += kWarps) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Octet loaded[kOctets];
      ahead.take(loaded);
      load(step + kStepsAhead<tiles> * kWarps, half);
#pragma unroll
      for (int word = 0; word < 4; word += 2) {  // 16 columns: two words of the octet of each lane
#pragma unroll
        for (int j = 0; j < tiles; j++) {
          const Octet& of_rank = loaded[kRowOctets + j];
#pragma unroll
          for (int i = 0; i < kRowTiles; i++) {
            const Octet &upper = loaded[2 * i], &lower = loaded[2 * i + 1];
            mma_bf16_16x8x16(sums[j][i], {upper.at[word], lower.at[word], upper.at[word + 1], lower.at[word + 1]},
                             {of_rank.at[word], of_rank.at[word + 1]});
          }
        }
      }
    }
  }
  ahead.end();
  __syncthreads();

  auto* partial = (Sums*)shared_memory();  // of each warp
  constexpr int kSums = tiles * kRowTiles * kWarp;
#pragma unroll
  for (int j = 0; j < tiles; j++) {
#pragma unroll
    for (int i = 0; i < kRowTiles; i++) {
      const auto& s = sums[j][i];
      partial[warp * kSums + (j * kRowTiles + i) * kWarp + lane] = {s[0], s[1], s[2], s[3]};
    }
  }
  sum_over_cluster(partial, kSums, p.split, [&](int at, const Sums& sum) {
    const int tile = at / kWarp, of_lane = at % kWarp;
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const int64_t row = first_row + tile % kRowTiles * 16 + of_lane / 4 + v / 2 * 8;
      const int64_t r = first_rank + tile / kRowTiles * 8 + of_lane % 4 * 2 + v % 2;
      if (row >= p.rows || r >= projection.rank) continue;
      projection.out[row * projection.out_stride + r] = BFloat16::narrow(sum.at[v] * p.scale);
    }
  });
}

constexpr int kOuterColumns = 64;
constexpr int kOuterStep = 16;         // rows
constexpr int kOuterBlocks = 256;      // wanted, to fill a GPU twice
constexpr int kOuterSums = 8 * kWarp;  // of a warp and 16 ranks, in fours

__host__ __device__ int64_t numel(const OuterProduct& product) { return product.rank * product.columns; }

struct Outer {
  Together<OuterProduct> all;
  int64_t rows, part_rows;
  int part_count;             // blocks over the rows
  int rank_tiles;             // blocks over the ranks
  float* parts[kMostAtOnce];  // of each result, one after the other, where there are more than one
};

// A block's warps share 64 columns, 16 * tiles ranks and a part of the rows; each takes every 8th step of 16 rows.
// Blocks read pieces of the same rows at about the same time: with steps ahead, as project_kernel has them, they go
// apart, and 4096 rows and columns take an H200 25 us instead of 19.
template <int tiles, bool wide>
__global__ void __launch_bounds__(kThreads) outer_kernel(const __grid_constant__ Outer o) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const OuterProduct product = o.all.each[blockIdx.z / o.rank_tiles];
  const int64_t rank = product.rank, columns = product.columns, first_column = (int64_t)blockIdx.x * kOuterColumns;
  const int64_t first_rank = (int64_t)(blockIdx.z % o.rank_tiles) * 16 * tiles;
  let_next_kernel_begin();
  if (first_column >= columns || first_rank >= rank) return;
  const int64_t end = min(o.rows, (blockIdx.y + 1) * o.part_rows);
  const int64_t column = first_column + 8 * g;

  float sums[tiles][8][4] = {};
  for (int64_t first = blockIdx.y * o.part_rows + warp * kOuterStep; first < end; first += kWarps * kOuterStep) {
    // A lane reads rows 4t to 4t + 3, which stand for the tensor cores' 2t, 2t + 1, 2t + 8 and 2t + 9 in both factors,
    // and of them columns 8g to 8g + 7, each of which stands for column g of another tile.
    const int64_t row = first + 4 * t;
    Octet wides[4];
    uint16_t narrows[tiles][4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool inside = row + i < end;
      wides[i] = load_octet<wide>(product.x + (row + i) * columns + column, inside ? columns - column : 0);
#pragma unroll
      for (int j = 0; j < tiles; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int64_t r = first_rank + 16 * j + 8 * half + g;
          narrows[j][i][half] = inside && r < rank ? product.narrow[(row + i) * product.narrow_stride + r] : 0;
        }
      }
    }
    uint32_t a[tiles][4];
#pragma unroll
    for (int j = 0; j < tiles; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[j][i] = narrows[j][i / 2 * 2][i % 2] | (uint32_t)narrows[j][i / 2 * 2 + 1][i % 2] << 16;
      }
    }
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int shift = c % 2 * 16;
      uint32_t b[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        b[i] = (wides[2 * i].at[c / 2] >> shift & 0xffff) | wides[2 * i + 1].at[c / 2] >> shift << 16;
      }
#pragma unroll
      for (int j = 0; j < tiles; j++) mma_bf16_16x8x16(sums[j][c], a[j], b);
    }
  }

  float* const out =
      o.part_count > 1 ? o.parts[blockIdx.z / o.rank_tiles] + blockIdx.y * numel(product) : product.out;
  auto* partial = (Sums*)shared_memory();  // of each warp
#pragma unroll
  for (int j = 0; j < tiles; j++) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto& s = sums[j];
        const int c = 4 * half;
        partial[warp * kOuterSums + (2 * i + half) * kWarp + lane] = {s[c][i], s[c + 1][i], s[c + 2][i], s[c + 3][i]};
      }
    }
    sum_over_cluster(partial, kOuterSums, 1, [&](int at, const Sums& sum) {
      const int of_lane = at % kWarp, half = at / kWarp % 2, i = at / kWarp / 2;
      const int64_t r = first_rank + 16 * j + of_lane / 4 + i / 2 * 8;
      const int64_t first = first_column + 8 * (of_lane % 4 * 2 + i % 2) + 4 * half;
#pragma unroll
      for (int v = 0; v < 4; v++) {
        if (r >= rank || first + v >= columns) continue;
        out[product.transposed ? (first + v) * rank + r : r * columns + first + v] = sum.at[v];
      }
    });
  }
}

__global__ void sum_kernel(const __grid_constant__ Outer o) {
  wait_for_kernel_before();
  const OuterProduct& product = o.all.each[blockIdx.y];
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= numel(product)) return;
  const float* const parts = o.parts[blockIdx.y];
  float sum = 0;
#pragma unroll 8
  for (int part = 0; part < o.part_count; part++) sum += parts[part * numel(product) + i];
  product.out[i] = sum;
}

// f(tiles, wide) with constants: the fewest tiles that hold the rank, or the most.
template <int width, int most = kMostTiles, class F>
int specialized(int64_t rank, bool wide, const F& f) {
  if constexpr (most > 1) {
    if (rank <= width * most / 2) return specialized<width, most / 2>(rank, wide, f);
  }
  const std::integral_constant<int, most> tiles;
  return wide ? f(tiles, std::true_type()) : f(tiles, std::false_type());
}

constexpr int kMostSplit = 8;           // blocks of a cluster, on any GPU that has clusters
constexpr int64_t kProjectBlocks = 64;  // in clusters, at most: with 128 an H200 takes a fifth longer for 512 rows

}  // namespace

int skinny_round_cuda(const Factor* factors, int64_t count, void* stream) {
  for (int64_t begin = 0; begin < count; begin += kMostAtOnce) {
    Factors some = {};
    const int64_t of_launch = std::min<int64_t>(count - begin, kMostAtOnce);
    int64_t most = 0;  // elements
    for (int64_t i = 0; i < of_launch; i++) {
      some.each[i] = factors[begin + i];
      most = std::max(most, some.each[i].rank * some.each[i].columns);
    }
    if (most == 0) continue;
    const dim3 grid((unsigned)divide_up(most, kThreads), (unsigned)of_launch);
    const int launched = launch<round_kernel>(current_device(), {grid, kThreads, 0, stream}, some);
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

int skinny_project_cuda(const Projection* projections, int64_t count, int64_t rows, float scale, void* stream) {
  if (rows == 0) return cudaSuccess;
  for (int64_t begin = 0; begin < count; begin += kMostAtOnce) {
    Project p = {{projections + begin, count - begin}, rows, scale, 1};
    if (p.all.most_rank == 0) continue;
    // It depends on the numbers of rows and columns alone, and so does the order of sums.
    const int64_t blocks = divide_up(rows, kProjectRows), steps = divide_up(p.all.most_columns, kStep);
    const Device& device = current_device();
    while (device.is_hopper_or_later() && p.split < kMostSplit && 2 * p.split * blocks <= kProjectBlocks &&
           2 * p.split * kWarps <= steps) {
      p.split *= 2;
    }
    const int launched = specialized<8>(p.all.most_rank, p.all.wide, [&](auto tiles, auto constant_wide) {
      constexpr int kTiles = decltype(tiles)::value;
      const dim3 grid((unsigned)(blocks * p.split), (unsigned)divide_up(p.all.most_rank, 8 * kTiles),
                      (unsigned)p.all.count);
      const Launch how = {grid, kThreads, ProjectAhead<kTiles>::kBytes, stream, (unsigned)p.split};
      return launch<project_kernel<kTiles, decltype(constant_wide)::value>>(device, how, p);
    });
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

int64_t skinny_outer_parts(const OuterProduct* products, int64_t count, int64_t rows) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; i++) blocks += divide_up(products[i].columns, kOuterColumns);
  const int64_t wanted = kOuterBlocks / std::max<int64_t>(1, blocks);
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows / (kWarps * kOuterStep)));
}

int skinny_outer_cuda(const OuterProduct* products, int64_t count, int64_t rows, float* parts, void* stream) {
  const int64_t part_count = skinny_outer_parts(products, count, rows);
  const int64_t part_rows = divide_up(divide_up(rows, part_count), kOuterStep) * kOuterStep;
  const Device& device = current_device();
  for (int64_t begin = 0; begin < count; begin += kMostAtOnce) {
    Outer o = {{products + begin, count - begin}, rows, part_rows, (int)part_count, 1, {}};
    if (o.all.most_rank == 0 || o.all.most_columns == 0) continue;
    int64_t most = 0;  // elements of a result
    for (int i = 0; i < o.all.count && part_count > 1; i++) {
      const OuterProduct& product = o.all.each[i];
      most = std::max(most, numel(product));
      o.parts[i] = parts;
      parts += part_count * numel(product);
    }
    int launched = specialized<16>(o.all.most_rank, o.all.wide, [&](auto tiles, auto constant_wide) {
      constexpr int kTiles = decltype(tiles)::value;
      o.rank_tiles = (int)divide_up(o.all.most_rank, 16 * kTiles);
      const dim3 grid((unsigned)divide_up(o.all.most_columns, kOuterColumns), (unsigned)part_count,
                      (unsigned)(o.all.count * o.rank_tiles));
      const Launch how = {grid, kThreads, kWarps * kOuterSums * sizeof(Sums), stream};
      return launch<outer_kernel<kTiles, decltype(constant_wide)::value>>(device, how, o);
    });
    if (launched == cudaSuccess && part_count > 1) {
      const dim3 grid((unsigned)divide_up(most, kThreads), (unsigned)o.all.count);
      launched = launch<sum_kernel>(device, {grid, kThreads, 0, stream, 1, true}, o);
    }
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

}  // namespace entrenar
