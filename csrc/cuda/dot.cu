// y = x Wᵀ + bias, or y += x Wᵀ + bias, for few rows of x.
//
// A warp computes 16 rows of W by tensor cores: the codes q, exact in bfloat16, are the matrix of 16 rows, and rows of x
// the matrix of 8 columns. The sum of q x over a block of codes is multiplied by the block's scale once, in float32. A
// float32 x is the sum of three bfloat16 numbers, each with a column of its own.
//
// Every warp copies its codes into shared memory of its own, a chunk ahead, and waits for no other warp there; x and the
// scales are brought by all warps of a block, and asked for before the codes: behind them they came when the codes had
// come, and 4096 x 4096 with a row of x took 0.9 us more on an H200. Which element of a block is which k of an
// instruction is free, as long as both matrices agree.
#include "dot.h"

#include "few_rows.h"

namespace entrenar {

namespace {

constexpr int kWarps = 16;
constexpr int kWarpRows = 16;     // of W
constexpr int kMostColumns = 64;  // of x
constexpr int kAhead = 2;         // chunks of a warp that are on the way
constexpr int kSlotBytes = kWarpRows * kChunkBytes;
constexpr int kPadding = 16;      // elements; columns of x then lie in different banks
constexpr int kPiece = 8;         // elements of x in 16 bytes, and scales of a row, that a thread brings at once
constexpr int kPiecesAhead = 2;   // of scales, which a thread loads before it stores the first

// Division of small numbers by one from 2 on: exact where their product is below 2^32.
struct Divisor {
  unsigned by, reciprocal;

  __device__ unsigned divide(unsigned n) const { return (unsigned)((uint64_t)n * reciprocal >> 32); }
};

Divisor divisor(int by) { return {(unsigned)by, (unsigned)(((uint64_t)1 << 32) / by + 1)}; }

struct Dot {
  Weight w;
  Dtype dtype;
  const void* x;
  const float* bias;
  bool add_to_y;
  void* y;
  int rows, parts, columns;  // of x; of an element, and the columns that parts of rows make
  int row_warps;             // of a block, over W's rows
  int log_k_warps;           // of a block, over W's columns
  int log_split;             // blocks of a cluster, over W's columns
  int slots;                 // chunks of codes in a warp's shared memory
  int stage;                 // chunks of x, and of scales, in shared memory
  Divisor x_pieces, scale_pieces;  // of a row in a stage
  bool x_aligned, scales_aligned;

  __host__ __device__ int x_stride() const { return stage * kChunk + kPadding; }
  // An odd multiple of four, so that eight rows lie in different banks.
  __host__ __device__ int scale_stride() const { return (int)scale_pieces.by * kPiece + 4; }
};

// Codes of elements j..j+3 and j+16..j+19 of a group, a quarter of q each, as pairs of neighbours.
struct Decoded {
  uint32_t low[2], high[2];
};

__device__ __forceinline__ Decoded decode(uint32_t word) {
  const uint32_t first = __byte_perm(word, 0, 0x3120), second = first >> 8;  // bytes 0 and 1, 2 and 3, in either half
  return {{low_nibbles(first), low_nibbles(second)}, {high_nibbles(first), high_nibbles(second)}};
}

// A piece of x that cp.async cannot bring: not aligned, of float32, or beyond the last column.
__device__ void stage_x(const Dot& d, unsigned m, int64_t column, uint16_t* to) {
  Pack<uint16_t, kPiece> parts[3] = {};
#pragma unroll
  for (int j = 0; j < kPiece; j++) {
    if (column + j >= d.w.columns) break;
    const int64_t at = m * d.w.columns + column + j;
    if (d.dtype == kBFloat16) {
      parts[0].at[j] = ((const uint16_t*)d.x)[at];
    } else {
      uint16_t of_one[3];
      to_parts(((const float*)d.x)[at], of_one);
      for (int p = 0; p < 3; p++) parts[p].at[j] = of_one[p];
    }
  }
#pragma unroll
  for (int p = 0; p < 3; p++) {
    if (p < d.parts) *(Pack<uint16_t, kPiece>*)(to + p * d.rows * d.x_stride()) = parts[p];
  }
}

// Scales of a row, `left` of which exist.
template <Dtype kScale>
struct Scales {
  using Scale = typename Float<kScale>::Bits;
  using Half = Pack<Scale, kPiece / 2>;
  Half half[2];

  __device__ __forceinline__ void load(const Scale* from, int64_t left, bool aligned) {
    if (aligned) {
#pragma unroll
      for (int h = 0; h < 2; h++) half[h] = h * kPiece / 2 < left ? ((const Half*)from)[h] : Half{};
    } else {
#pragma unroll
      for (int j = 0; j < kPiece; j++) half[j / 4].at[j % 4] = j < left ? from[j] : Scale();
    }
  }

  __device__ __forceinline__ void store(float* to) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Pack<float, kPiece / 2> wide;
#pragma unroll
      for (int j = 0; j < kPiece / 2; j++) wide.at[j] = Float<kScale>::widen(half[h].at[j]);
      ((Pack<float, kPiece / 2>*)to)[h] = wide;
    }
  }
};

// Brings x of the stage's chunks, from `chunk` on, as columns of bfloat16 into shared memory: part p of row m is column
// p * rows + m. And the scales of the block's rows there, as float32. x by a group of copies, before copy_codes() makes
// its own; that is called when all is asked for.
template <int kBlock, Dtype kScale, class CopyCodes>
__device__ __forceinline__ void stage(const Dot& d, int64_t first_row, int block_rows, int chunk, uint16_t* x,
                                      float* scales, const CopyCodes& copy_codes) {
  const int64_t k = d.w.columns, blocks = int4::blocks(k, kBlock), first_block = (int64_t)chunk * (kChunk / kBlock);
  const unsigned x_pieces = d.rows * d.x_pieces.by, scale_pieces = block_rows * d.scale_pieces.by;
  for (unsigned i = threadIdx.x; i < x_pieces; i += blockDim.x) {
    const unsigned m = d.x_pieces.divide(i), offset = (i - m * d.x_pieces.by) * kPiece;
    const int64_t column = (int64_t)chunk * kChunk + offset;
    uint16_t* to = x + m * d.x_stride() + offset;
    if (d.x_aligned && column < k) {
      copy_async_16(to, (const uint16_t*)d.x + m * k + column);
    } else {
      stage_x(d, m, column, to);
    }
  }
  group_copies();
  const bool aligned = d.scales_aligned && first_block % (kPiece / 2) == 0;
  for (unsigned begin = 0; begin < scale_pieces; begin += kPiecesAhead * blockDim.x) {
    Scales<kScale> loaded[kPiecesAhead];
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int j = 0; j < kPiecesAhead; j++) {
        const unsigned i = begin + j * blockDim.x + threadIdx.x;
        if (i >= scale_pieces) break;
        const unsigned row = d.scale_pieces.divide(i);
        f(loaded[j], row, (i - row * d.scale_pieces.by) * kPiece);
      }
    };
    each([&](Scales<kScale>& piece, unsigned row, unsigned offset) {
      const int64_t at = min(first_row + row, d.w.rows - 1) * blocks + first_block + offset;
      piece.load((const typename Scales<kScale>::Scale*)d.w.scales + at, blocks - first_block - offset, aligned);
    });
    if (begin == 0) copy_codes();
    each([&](const Scales<kScale>& piece, unsigned row, unsigned offset) {
      piece.store(scales + row * d.scale_stride() + offset);
    });
  }
}

// Copies a warp's codes into slots of its own, chunk by chunk.
struct Copies {
  const uint4* from[2];  // rows that the lane copies
  int unit, last_unit;   // of a row
  char* to;
  int slots, slot = 0;

  __device__ __forceinline__ Copies(const Dot& d, int64_t first_row, int chunk, char* slots_of_warp) : slots(d.slots) {
    const int lane = threadIdx.x % kWarp, row = lane / 4;
    const int64_t groups = int4::groups(d.w.columns);
    for (int r = 0; r < 2; r++) from[r] = (const uint4*)d.w.codes + min(first_row + row + 8 * r, d.w.rows - 1) * groups;
    unit = chunk * 4 + lane % 4;
    last_unit = (int)groups - 1;
    to = slots_of_warp + row * kChunkBytes + exchanged(row, lane % 4) * int4::kGroupBytes;
  }

  // What lies beyond the last column or row is copied from before it: it meets zeros of x, or is not used.
  __device__ __forceinline__ void next(int chunks_on) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      copy_async_16(to + slot * kSlotBytes + 8 * r * kChunkBytes, from[r] + min(unit, last_unit));
    }
    unit += 4 * chunks_on;
    slot = slot + 1 == slots ? 0 : slot + 1;
  }
};

template <int kTiles, int kBlock, Dtype kScale>
__global__ void __launch_bounds__(kWarps* kWarp, 1) dot_kernel(const __grid_constant__ Dot d) {
  constexpr int kBlocks = kChunk / kBlock;        // of a chunk
  constexpr int kWords = kBlock / int4::kGroup;   // of a block's codes in each of four lanes
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int k_warps = 1 << d.log_k_warps, k_warp = warp & (k_warps - 1), row_warp = warp >> d.log_k_warps;
  const int split = 1 << d.log_split, block_rows = d.row_warps * kWarpRows;
  const unsigned rank = blockIdx.x & (split - 1);
  const int64_t first_row = (int64_t)(blockIdx.x >> d.log_split) * block_rows;
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  const int first = (int)(chunks * rank >> d.log_split), end = (int)(chunks * (rank + 1) >> d.log_split);
  int chunk = first + k_warp, to_copy = chunk, slot = 0;

  auto* x = (uint16_t*)shared_memory();
  auto* scales = (float*)(x + d.columns * d.x_stride());
  char* slots = (char*)(scales + block_rows * d.scale_stride()) + warp * d.slots * kSlotBytes;
  Copies copies(d, first_row + row_warp * kWarpRows, chunk, slots);
  const auto copy_next = [&] {
    if (to_copy < end) copies.next(k_warps);
    group_copies();
    to_copy += k_warps;
  };
  // In a block: the element that the low nibble of a lane's first byte stands for. In a slot: where that byte is.
  const int element = kBlock == 64 ? t / 2 * int4::kGroup + t % 2 * 8 : t * 4;
  int bytes[kBlocks];
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    const int unit = exchanged(g, b * kWords + (kBlock == 64 ? t / 2 : 0));
    bytes[b] = g * kChunkBytes + unit * int4::kGroupBytes + (kBlock == 64 ? t % 2 * 8 : t * 4);
  }
  // What lies beyond the last column is computed from it, and not used.
  const int last_tile = (d.columns - 1) / kTile, last_column = min(last_tile * kTile + g, d.columns - 1);
  const int x_offset = g * d.x_stride() + element, last_x_offset = last_column * d.x_stride() + element;
  const float* scales_of_lane = scales + (row_warp * kWarpRows + g) * d.scale_stride();

  wait_for_kernel_before();
  float sums[kTiles][4] = {};
  for (int begin = first; begin < end; begin += d.stage) {
    if (begin > first) __syncthreads();
    stage<kBlock, kScale>(d, first_row, block_rows, begin, x, scales, [&] {
      if (begin > first) return;
#pragma unroll 1
      for (int i = 0; i < kAhead; i++) copy_next();
    });
    begin == first ? wait_for_groups<kAhead>() : wait_for_groups<0>();
    __syncthreads();
    for (; chunk < min(begin + d.stage, end); chunk += k_warps) {
      wait_for_groups<kAhead - 1>();
      __syncwarp();
      const int in_stage = chunk - begin;
      Pack<float, kBlocks> scale[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        scale[r] = *(const Pack<float, kBlocks>*)(scales_of_lane + r * 8 * d.scale_stride() + in_stage * kBlocks);
      }
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        Decoded rows[2][kWords];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const char* from = slots + slot * kSlotBytes + bytes[b] + r * 8 * kChunkBytes;
          const auto words = *(const Pack<uint32_t, kWords>*)from;
#pragma unroll
          for (int i = 0; i < kWords; i++) rows[r][i] = decode(words.at[i]);
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          if (tile > last_tile) break;
          using Elements = Pack<uint32_t, 2 * kWords>;
          const int column = tile == last_tile ? last_x_offset : x_offset + tile * kTile * d.x_stride();
          const uint16_t* at = x + column + in_stage * kChunk + b * kBlock;
          const Elements low = *(const Elements*)at, high = *(const Elements*)(at + int4::kGroupBytes);
          float sum[4] = {};
#pragma unroll
          for (int i = 0; i < kWords; i++) {
            const Decoded &p = rows[0][i], &q = rows[1][i];
            mma_bf16_16x8x16(sum, {p.low[0], q.low[0], p.low[1], q.low[1]}, {low.at[2 * i], low.at[2 * i + 1]});
            mma_bf16_16x8x16(sum, {p.high[0], q.high[0], p.high[1], q.high[1]}, {high.at[2 * i], high.at[2 * i + 1]});
          }
#pragma unroll
          for (int i = 0; i < 4; i++) sums[tile][i] += scale[i / 2].at[b] * sum[i];
        }
      }
      __syncwarp();
      slot = slot + 1 == d.slots ? 0 : slot + 1;
      copy_next();
    }
  }
  __syncthreads();

  auto* partial = (float*)shared_memory();  // [k_warps][columns][stride]
  const int stride = block_rows + 4;        // so that four columns lie in different banks
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = tile * kTile + t * 2 + i % 2, row = row_warp * kWarpRows + g + i / 2 * 8;
      if (column < d.columns) partial[(k_warp * d.columns + column) * stride + row] = sums[tile][i];
    }
  }
  d.log_split ? cluster_barrier() : __syncthreads();
  for (int m = warp; m < d.rows; m += blockDim.x / kWarp) {
    for (int r = rank * kWarp + lane; r < block_rows; r += split * kWarp) {
      const int64_t n = first_row + r;
      if (n >= d.w.rows) break;
      float sum = 0;
      for (int p = d.parts - 1; p >= 0; p--) {  // the smallest first
        for (int q = 0; q < split; q++) {
          const float* of_rank = d.log_split ? of_block(partial, q) : partial;
          for (int k = 0; k < k_warps; k++) sum += of_rank[(k * d.columns + p * d.rows + m) * stride + r];
        }
      }
      sum *= kCodeOfQuarter;
      if (d.bias) sum += d.bias[n];
      if (d.dtype == kFloat32) {
        float& y = ((float*)d.y)[m * d.w.rows + n];
        y = d.add_to_y ? y + sum : sum;
      } else {
        uint16_t& y = ((uint16_t*)d.y)[m * d.w.rows + n];
        y = Float<kBFloat16>::narrow(d.add_to_y ? int4::bfloat16_to_float(y) + sum : sum);
      }
    }
  }
  if (d.log_split) cluster_barrier();  // the others still read
}

// W's columns are shared out over the warps of a block and the blocks of a cluster, into so many parts as that depends on
// the columns alone, never on W's rows: a row's sum is always taken in the same order.
constexpr int kLogParts = 3;
// From more columns of x on, on an H200, two blocks that each bring half of x take less time. Four take more: 128 of them
// that each fill a multiprocessor find no place at once.
constexpr int kColumnsToSplit = 5;
constexpr int64_t kBlocksToFill = 128;  // about the multiprocessors of a large GPU

template <int kTiles, int kBlock, Dtype kScale>
int plan_and_launch(Dot d, const Device& device, void* stream) {
  constexpr int kBlocks = kChunk / kBlock;
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  int log_parts = 0;
  while (log_parts < kLogParts && 2 << log_parts <= chunks) log_parts++;
  d.log_split = device.is_hopper_or_later() && d.columns >= kColumnsToSplit && log_parts > 0;
  d.log_k_warps = log_parts - d.log_split;
  const int split = 1 << d.log_split, of_block = (int)((chunks + split - 1) / split);

  int rounds;  // of a warp's chunks
  const auto bytes = [&](int rounds_of_stage) {
    const int k_warps = 1 << d.log_k_warps;
    rounds = (of_block + k_warps - 1) / k_warps;
    d.row_warps = kWarps / k_warps;
    d.slots = min(kAhead, rounds);
    d.stage = rounds_of_stage * k_warps;
    d.x_pieces = divisor(d.stage * (kChunk / kPiece));
    d.scale_pieces = divisor(max((d.stage * kBlocks + kPiece - 1) / kPiece, 2));
    return d.columns * d.x_stride() * (int)sizeof(uint16_t) +
           d.row_warps * kWarpRows * d.scale_stride() * (int)sizeof(float) + kWarps * d.slots * kSlotBytes;
  };
  while (bytes(1) > device.shared_bytes && d.log_k_warps > 0) d.log_k_warps--;
  int stage = rounds;
  while (stage > 1 && bytes(stage) > device.shared_bytes) stage = (stage + 1) / 2;
  const int shared_bytes = bytes(stage), k_warps = 1 << d.log_k_warps;

  const auto row_blocks = [&] { return (d.w.rows + d.row_warps * kWarpRows - 1) / (d.row_warps * kWarpRows); };
  while (d.row_warps > 1 && row_blocks() * split < kBlocksToFill) d.row_warps /= 2;
  const int partial_bytes = k_warps * d.columns * (d.row_warps * kWarpRows + 4) * (int)sizeof(float);
  const Launch how = {dim3((unsigned)(row_blocks() * split)), (unsigned)(d.row_warps * k_warps * kWarp),
                      max(shared_bytes, partial_bytes), stream, (unsigned)split, true};
  return launch<dot_kernel<kTiles, kBlock, kScale>>(device, how, d);
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
  d.x_aligned = dtype == kBFloat16 && w.columns % kPiece == 0 && (uintptr_t)x % 16 == 0;
  d.scales_aligned = int4::blocks(w.columns, w.block) % (kPiece / 2) == 0 &&
                     (uintptr_t)w.scales % (kPiece / 2 * (w.float32_scales ? 4 : 2)) == 0;
  const Device device;
  const auto with_tiles = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    const auto with_scale = [&](auto scale) {
      constexpr Dtype kScale = decltype(scale)::value;
      return w.block == 64 ? plan_and_launch<kTiles, 64, kScale>(d, device, stream)
                           : plan_and_launch<kTiles, 32, kScale>(d, device, stream);
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
