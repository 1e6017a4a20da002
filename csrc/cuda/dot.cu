// y = x Wᵀ + bias, or y += x Wᵀ + bias, for few rows of x.
//
// A warp computes 16 rows of W by tensor cores: the codes q, exact in bfloat16, are the matrix of 16 rows, and rows of x
// the matrix of 8 columns. The sum of q x over a block of codes is multiplied by the block's scale once, in float32. A
// float32 x is the sum of three bfloat16 numbers, each with a column of its own.
//
// Codes go from memory to registers, where they are used: which element of a block is which k of an instruction is
// free, as long as both matrices agree. Loads run ahead, the first of them before x has come.
#include "dot.h"

#include "async.h"
#include "cluster.h"
#include "floats.h"
#include "mma.h"

namespace entrenar {

namespace {

constexpr int kWarps = 8;
constexpr int kWarpRows = 16;             // of W
constexpr int kTile = 8;                  // columns of an instruction
constexpr int kMostColumns = 64;          // of x
constexpr int kChunk = 4 * int4::kGroup;  // elements of a row that four lanes load, 16 bytes each
constexpr int kPadding = 16;              // elements; columns of x then lie in different banks
constexpr int kPiece = 8;                 // elements of x in 16 bytes
constexpr int kSharedBytes = 48 << 10;    // which a kernel may use unasked

// The bfloat16 numbers whose sum is an element of x.
constexpr int bfloat16_parts(Dtype dtype) { return dtype == kFloat32 ? 3 : 1; }

// Two blocks of few columns share a multiprocessor, and its registers.
constexpr int blocks_at_once(int tiles) { return tiles <= 2 ? 2 : 1; }

// Chunks that a lane has on the way: as many as the registers hold beside the sums.
constexpr int chunks_ahead(int tiles) { return tiles == 2 || tiles == 8 ? 2 : 4; }

struct Dot {
  Weight w;
  Dtype dtype;
  const void* x;
  const float* bias;
  bool add_to_y;
  void* y;
  int rows, parts, columns;  // of x; of an element, and the columns that parts of rows make
  int row_warps, k_warps;    // of a block: over W's rows and over its columns
  int split;                 // blocks of a cluster, over W's columns
  int step;                  // chunks that a warp reads at once
  int stage;                 // chunks of x in shared memory
  bool x_aligned;

  __device__ int stride() const { return stage * kChunk + kPadding; }
};

// Codes of elements j..j+3 and j+16..j+19 of a group, as pairs of neighbours.
struct Decoded {
  uint32_t low[2], high[2];
};

__device__ __forceinline__ uint32_t pair(uint32_t nibbles, uint32_t selector) {
  const uint32_t biased = __byte_perm(nibbles, 0x43434343, selector);  // 128 + u in bfloat16
#if defined(__CUDA_ARCH__)
  const uint32_t offset = 0x43084308;  // 136
  __nv_bfloat162 a, b;
  memcpy(&a, &biased, sizeof a);
  memcpy(&b, &offset, sizeof b);
  const __nv_bfloat162 difference = __hsub2(a, b);
  uint32_t bits;
  memcpy(&bits, &difference, sizeof bits);
  return bits;
#else
  const auto one = [](uint32_t bits) {
    return (uint32_t)int4::float_to_bfloat16(int4::bfloat16_to_float((uint16_t)bits) - 136.0f);
  };
  return one(biased & 0xffff) | one(biased >> 16) << 16;
#endif
}

__device__ __forceinline__ Decoded decode(uint32_t word) {
  const uint32_t low = word & 0x0f0f0f0f, high = word >> 4 & 0x0f0f0f0f;
  return {{pair(low, 0x4140), pair(low, 0x4342)}, {pair(high, 0x4140), pair(high, 0x4342)}};
}

// Elements of x as bfloat16 numbers: their sum is x, unless a part is too small for float32.
__device__ __forceinline__ void split(float x, uint16_t (&parts)[3]) {
  const bool finite = (int4::float_bits(x) & 0x7f800000) != 0x7f800000;
  parts[0] = finite ? (uint16_t)(int4::float_bits(x) >> 16) : Float<kBFloat16>::narrow(x);
  const float rest = finite ? x - int4::bfloat16_to_float(parts[0]) : 0.0f;
  parts[1] = (uint16_t)(int4::float_bits(rest) >> 16);
  parts[2] = Float<kBFloat16>::narrow(rest - int4::bfloat16_to_float(parts[1]));
}

// Chunks [begin, end) of x as columns of bfloat16 in shared memory: part p of row m is column p * rows + m.
__device__ void stage_x(const Dot& d, int begin, int end, uint16_t* staged) {
  const unsigned pieces = (end - begin) * (kChunk / kPiece);
  const int64_t k = d.w.columns, first = (int64_t)begin * kChunk;
  for (unsigned i = threadIdx.x; i < d.rows * pieces; i += blockDim.x) {
    const unsigned m = i / pieces, offset = i % pieces * kPiece;
    uint16_t* to = staged + m * d.stride() + offset;
    const int64_t column = first + offset;
    if (d.dtype == kBFloat16 && d.x_aligned && column < k) {
      copy_async_16(to, (const uint16_t*)d.x + m * k + column);
      continue;
    }
    Pack<uint16_t, kPiece> parts[3] = {};
#pragma unroll
    for (int j = 0; j < kPiece; j++) {
      if (column + j >= k) break;
      if (d.dtype == kBFloat16) {
        parts[0].at[j] = ((const uint16_t*)d.x)[m * k + column + j];
      } else {
        uint16_t of_one[3];
        split(((const float*)d.x)[m * k + column + j], of_one);
        for (int p = 0; p < 3; p++) parts[p].at[j] = of_one[p];
      }
    }
#pragma unroll
    for (int p = 0; p < 3; p++) {
      if (p < d.parts) *(Pack<uint16_t, kPiece>*)(to + p * d.rows * d.stride()) = parts[p];
    }
  }
}

// A lane's part of a warp's product. With g = lane / 4 it reads rows g and g + 8 of the warp's 16.
template <int kTiles, int kBlock, Dtype kScale>
struct Lane {
  using Scale = typename Float<kScale>::Bits;
  static constexpr int kBlocks = kChunk / kBlock;       // of a chunk
  static constexpr int kAhead = chunks_ahead(kTiles);
  static constexpr int kHeld = (kAhead * kBlocks + 3) / 4;  // blocks of a step whose scales a lane holds: t, t + 4, ...
  static constexpr int kWords = kBlock / int4::kGroup;  // of a block's codes, in each of four lanes

  const Dot& d;
  const int t = threadIdx.x % 4, g = threadIdx.x % kWarp / 4;
  const int groups = (int)int4::groups(d.w.columns), blocks = (int)int4::blocks(d.w.columns, kBlock);  // of a row
  const uint4* codes[2];  // of its rows
  const Scale* scales[2];
  uint4 ahead[kAhead][2];
  Scale scales_ahead[2][kHeld];
  float sums[kTiles][4] = {};

  __device__ Lane(const Dot& d, int64_t first_row) : d(d) {
    for (int r = 0; r < 2; r++) {
      const int64_t row = min(first_row + g + 8 * r, d.w.rows - 1);
      codes[r] = (const uint4*)d.w.codes + row * groups;
      scales[r] = (const Scale*)d.w.scales + row * blocks;
    }
  }

  // What lies beyond the last column is loaded from before it: it meets zeros of x.
  __device__ __forceinline__ void load_codes(int i, int chunk) {
    const int group = min(chunk * 4 + t, groups - 1);
#pragma unroll
    for (int r = 0; r < 2; r++) ahead[i][r] = __ldcs(codes[r] + group);
  }

  __device__ __forceinline__ void load_scales(int chunk, int chunks) {
#pragma unroll
    for (int h = 0; h < kHeld; h++) {
      if (4 * h >= chunks * kBlocks) break;
      const int block = min(chunk * kBlocks + 4 * h + t, blocks - 1);
#pragma unroll
      for (int r = 0; r < 2; r++) scales_ahead[r][h] = __ldcs(scales[r] + block);
    }
  }

  // Begins to load the chunks that add() will be called with first.
  __device__ __forceinline__ void load(int chunk, int chunks) {
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (i < chunks) load_codes(i, chunk + i);
    }
    load_scales(chunk, chunks);
  }

  // Adds the products of loaded chunks with x, staged from their first on, and loads the next in their place.
  __device__ __forceinline__ void add(int chunks, const uint16_t* x, int next, int next_chunks) {
    float scale[2][kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; h++) {
#pragma unroll
      for (int r = 0; r < 2; r++) scale[r][h] = Float<kScale>::widen(scales_ahead[r][h]);
    }
    load_scales(next, next_chunks);
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
      if (i >= chunks) break;
      uint32_t words[2][kBlocks][kWords];
#pragma unroll
      for (int r = 0; r < 2; r++) spread(ahead[i][r], words[r]);
      if (i < next_chunks) load_codes(i, next + i);
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        const int of_step = i * kBlocks + b, from = g * 4 + of_step % 4;
        float s[2];
#pragma unroll
        for (int r = 0; r < 2; r++) s[r] = __shfl_sync(kAllLanes, scale[r][of_step / 4], from);
        add_block(words[0][b], words[1][b], s, x + i * kChunk + b * kBlock);
      }
    }
  }

  // From 16 bytes of a group in each of four lanes to kWords words of every block in each. Lane t then holds the words
  // that element_of_lane() tells.
  __device__ __forceinline__ void spread(const uint4& group, uint32_t (&words)[kBlocks][kWords]) const {
    const bool second = t >= 2;  // two groups lie in the first two lanes
    uint32_t pairs[2][2];
    {
      const uint32_t kept[2] = {second ? group.z : group.x, second ? group.w : group.y};
      const uint32_t sent[2] = {second ? group.x : group.z, second ? group.y : group.w};
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t received = __shfl_xor_sync(kAllLanes, sent[i], 2);
        pairs[0][i] = second ? received : kept[i];
        pairs[1][i] = second ? kept[i] : received;
      }
    }
    if constexpr (kBlock == 64) {
#pragma unroll
      for (int i = 0; i < 4; i++) words[i / 2][i % 2] = pairs[i / 2][i % 2];
    } else {
      const bool odd = t % 2;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t received = __shfl_xor_sync(kAllLanes, odd ? pairs[i][0] : pairs[i][1], 1);
        words[2 * i][0] = odd ? received : pairs[i][0];
        words[2 * i + 1][0] = odd ? pairs[i][1] : received;
      }
    }
  }

  // The element of a block that the low nibble of its first byte stands for.
  __device__ __forceinline__ int element_of_lane() const {
    return kBlock == 64 ? t % 2 * int4::kGroup + t / 2 * 8 : t * 4;
  }

  __device__ __forceinline__ void add_block(const uint32_t (&upper)[kWords], const uint32_t (&lower)[kWords],
                                            const float (&scale)[2], const uint16_t* x) {
    Decoded rows[2][kWords];
#pragma unroll
    for (int i = 0; i < kWords; i++) {
      rows[0][i] = decode(upper[i]);
      rows[1][i] = decode(lower[i]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
      using Elements = Pack<uint32_t, 2 * kWords>;
      // What lies beyond the last column is computed from it, and not used.
      const auto* column = x + min(tile * kTile + g, d.columns - 1) * d.stride() + element_of_lane();
      const Elements low = *(const Elements*)column, high = *(const Elements*)(column + int4::kGroupBytes);
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kWords; i++) {
        const Decoded &a = rows[0][i], &b = rows[1][i];
        mma_bf16_16x8x16(sum, {a.low[0], b.low[0], a.low[1], b.low[1]}, {low.at[2 * i], low.at[2 * i + 1]});
        mma_bf16_16x8x16(sum, {a.high[0], b.high[0], a.high[1], b.high[1]}, {high.at[2 * i], high.at[2 * i + 1]});
      }
#pragma unroll
      for (int i = 0; i < 4; i++) sums[tile][i] += scale[i / 2] * sum[i];
    }
  }
};

template <int kTiles, int kBlock, Dtype kScale>
__global__ void __launch_bounds__(kWarps* kWarp, blocks_at_once(kTiles)) dot_kernel(const __grid_constant__ Dot d) {
  auto* staged = (uint16_t*)shared_memory();
  const int warp = threadIdx.x / kWarp, k_warp = warp % d.k_warps, row_warp = warp / d.k_warps;
  const int block_rows = d.row_warps * kWarpRows;
  const unsigned rank = blockIdx.x % d.split;
  const int64_t first_row = (int64_t)(blockIdx.x / d.split) * block_rows;
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  const int first = (int)(chunks * rank / d.split), end = (int)(chunks * (rank + 1) / d.split);
  const int stride = d.k_warps * d.step;
  const auto chunks_at = [&](int chunk) { return min(d.step, end - chunk); };

  Lane<kTiles, kBlock, kScale> lane(d, first_row + row_warp * kWarpRows);
  int chunk = first + k_warp * d.step;
  for (int begin = first; begin < end; begin += d.stage) {
    if (begin > first) __syncthreads();
    stage_x(d, begin, min(begin + d.stage, end), staged);
    if (begin == first) lane.load(chunk, chunks_at(chunk));
    wait_for_copies();
    __syncthreads();
    for (; chunk < min(begin + d.stage, end); chunk += stride) {
      lane.add(chunks_at(chunk), staged + (chunk - begin) * kChunk, chunk + stride, chunks_at(chunk + stride));
    }
  }
  __syncthreads();

  auto* partial = (float*)staged;  // [k_warps][columns][block_rows]
  const int columns = kTiles * kTile;
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = tile * kTile + lane.t * 2 + i % 2, row = row_warp * kWarpRows + lane.g + i / 2 * 8;
      partial[(k_warp * columns + column) * block_rows + row] = lane.sums[tile][i];
    }
  }
  d.split > 1 ? cluster_barrier() : __syncthreads();
  for (int i = rank * blockDim.x + threadIdx.x; i < d.rows * block_rows; i += d.split * blockDim.x) {
    const int m = i / block_rows, r = i % block_rows;
    const int64_t n = first_row + r;
    if (n >= d.w.rows) continue;
    float sum = 0;
    for (int p = d.parts - 1; p >= 0; p--) {  // the smallest first
      for (int q = 0; q < d.split; q++) {
        const float* of_rank = d.split > 1 ? of_block(partial, q) : partial;
        for (int k = 0; k < d.k_warps; k++) sum += of_rank[(k * columns + p * d.rows + m) * block_rows + r];
      }
    }
    if (d.bias) sum += d.bias[n];
    if (d.dtype == kFloat32) {
      float& y = ((float*)d.y)[m * d.w.rows + n];
      y = d.add_to_y ? y + sum : sum;
    } else {
      uint16_t& y = ((uint16_t*)d.y)[m * d.w.rows + n];
      y = Float<kBFloat16>::narrow(d.add_to_y ? int4::bfloat16_to_float(y) + sum : sum);
    }
  }
  if (d.split > 1) cluster_barrier();  // the others still read
}

// How the columns of W are shared out: over the warps of a block and the blocks of a cluster, each of which stages its
// part of x. It depends on W's columns, never on its rows: a row's sum is always taken in the same order.
struct Plan {
  int k_warps, split;
};

constexpr int kMostParts = 8;
constexpr int kColumnsToSplit = 4;  // from which on, on an H200, two blocks that each stage half of x take less time

Plan plan(const Dot& d) {
  int device, major;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  int parts = 1;
  while (parts < kMostParts && 2 * parts <= chunks) parts *= 2;
  const int split = major >= 9 && d.columns >= kColumnsToSplit && parts > 1 ? 2 : 1;
  return {parts / split, split};
}

constexpr int64_t kBlocksToFill = 128;  // about the multiprocessors of a large GPU

template <int kTiles, int kBlock, Dtype kScale>
int launch(Dot d, const Plan& plan, void* stream) {
  const auto x_bytes = [&](int stage) { return d.columns * (stage * kChunk + kPadding) * (int)sizeof(uint16_t); };
  d.k_warps = plan.k_warps;
  d.split = plan.split;
  while (d.k_warps > 1 && x_bytes(d.k_warps) > kSharedBytes) d.k_warps /= 2;
  d.row_warps = kWarps / d.k_warps;
  const auto tiles = [&] { return (d.w.rows + d.row_warps * kWarpRows - 1) / (d.row_warps * kWarpRows); };
  while (d.row_warps > 2 && tiles() * d.split < kBlocksToFill) d.row_warps /= 2;

  const int64_t chunks = ((d.w.columns + kChunk - 1) / kChunk + d.split - 1) / d.split;  // of a block
  d.step = chunks_ahead(kTiles);
  while (d.step > 1 && x_bytes(d.k_warps * d.step) > kSharedBytes) d.step /= 2;
  while (d.step > 1 && d.k_warps * (d.step - 1) >= chunks) d.step--;  // rather than leave warps idle
  const int round = d.k_warps * d.step;
  d.stage = round;
  while (d.stage < chunks && x_bytes(d.stage + round) <= kSharedBytes) d.stage += round;
  const int partial_bytes = d.k_warps * d.row_warps * kWarpRows * kTiles * kTile * (int)sizeof(float);

  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = d.split;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)(tiles() * d.split));
  config.blockDim = dim3(d.row_warps * d.k_warps * kWarp);
  config.dynamicSmemBytes = (size_t)max(x_bytes(d.stage), partial_bytes);
  config.stream = (cudaStream_t)stream;
  config.attrs = &cluster;
  config.numAttrs = d.split > 1;
  return cudaLaunchKernelEx(&config, dot_kernel<kTiles, kBlock, kScale>, d);
}

}  // namespace

bool int4_dot_takes(const Weight& w, Dtype dtype, int64_t rows) {
  return rows <= kMostColumns / bfloat16_parts(dtype) && (uintptr_t)w.codes % sizeof(uint4) == 0 &&
         (uintptr_t)w.scales % (w.float32_scales ? 4 : 2) == 0;
}

int int4_dot_cuda(const Weight& w, Dtype dtype, const void* x, int64_t rows, const float* bias, bool add_to_y, void* y,
                  void* stream) {
  if (rows == 0 || w.rows == 0) return cudaSuccess;
  Dot d = {};
  d.w = w;
  d.dtype = dtype;
  d.x = x;
  d.bias = bias;
  d.add_to_y = add_to_y;
  d.y = y;
  d.rows = (int)rows;
  d.parts = bfloat16_parts(dtype);
  d.columns = d.rows * d.parts;
  d.x_aligned = w.columns % kPiece == 0 && (uintptr_t)x % 16 == 0;
  const auto with_tiles = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    const auto with_scale = [&](auto scale) {
      constexpr Dtype kScale = decltype(scale)::value;
      return w.block == 64 ? launch<kTiles, 64, kScale>(d, plan(d), stream)
                           : launch<kTiles, 32, kScale>(d, plan(d), stream);
    };
    return w.float32_scales ? with_scale(std::integral_constant<Dtype, kFloat32>())
                            : with_scale(std::integral_constant<Dtype, kFloat16>());
  };
  if (d.columns <= 1 * kTile) return with_tiles(std::integral_constant<int, 1>());
  if (d.columns <= 2 * kTile) return with_tiles(std::integral_constant<int, 2>());
  if (d.columns <= 4 * kTile) return with_tiles(std::integral_constant<int, 4>());
  return with_tiles(std::integral_constant<int, kMostColumns / kTile>());
}

}  // namespace entrenar
