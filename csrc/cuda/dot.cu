// y = x Wᵀ + bias, or y += x Wᵀ + bias, for few rows of x.
//
// A warp computes 16 rows of W by tensor cores: the codes q, exact in bfloat16, are the matrix of 16 rows, and rows of x
// the matrix of 8 columns. The sum of q x over a block of codes is multiplied by the block's scale once, in float32. A
// float32 x is the sum of three bfloat16 numbers, each with a column of its own.
//
// Every warp copies its codes and their scales into shared memory of its own, some chunks ahead, through all rows of W
// that its block goes through, and waits for no other warp there; x is brought by all warps of a block, and asked for
// before the codes: behind them it came when the codes had come, and 4096 x 4096 with a row of x took 0.9 us more on an
// H200. Which element of a block is which k of an instruction is free, as long as both matrices agree.
#include "dot.h"

#include "few_rows.h"

namespace entrenar {

namespace {

constexpr int kWarps = 16;
constexpr int kWarpRows = 16;     // of W
constexpr int kMostColumns = 64;  // of x
constexpr int kPadding = 16;      // elements; columns of x then lie in different banks
constexpr int kPiece = 8;         // elements of x in 16 bytes, that a thread brings at once

// Chunks of a warp that are on the way. With more columns of x there is no memory for more.
template <int kTiles>
constexpr int kAhead = kTiles <= 2 ? 4 : 2;

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
  int stage;                 // chunks of x in shared memory
  Divisor x_pieces;          // of a row in a stage
  bool x_aligned, scales_aligned;

  __host__ __device__ int block_rows() const { return row_warps * kWarpRows; }
  __host__ __device__ int x_stride() const { return stage * kChunk + kPadding; }
  // So that four columns lie in different banks.
  __host__ __device__ int partial_stride() const { return block_rows() + 4; }
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

// Brings x of the stage's chunks, from `chunk` on, as columns of bfloat16 into shared memory: part p of row m is column
// p * rows + m.
__device__ __forceinline__ void stage(const Dot& d, int chunk, uint16_t* x) {
  const unsigned pieces = d.rows * d.x_pieces.by;
  for (unsigned i = threadIdx.x; i < pieces; i += blockDim.x) {
    const unsigned m = d.x_pieces.divide(i), offset = (i - m * d.x_pieces.by) * kPiece;
    const int64_t column = (int64_t)chunk * kChunk + offset;
    uint16_t* to = x + m * d.x_stride() + offset;
    if (d.x_aligned && column < d.w.columns) {
      copy_async<16>(to, (const uint16_t*)d.x + m * d.w.columns + column);
    } else {
      stage_x(d, m, column, to);
    }
  }
}

// A warp's chunk of its rows of W.
template <int kBlock, Dtype kScale>
struct Slot {
  using Scales = Pack<typename Float<kScale>::Bits, kChunk / kBlock>;
  alignas(16) char codes[kWarpRows * kChunkBytes];
  Scales scales[kWarpRows];
};

// Copies chunk after chunk, of one 16 rows after the other, into a warp's slots.
template <int kSlots, int kBlock, Dtype kScale>
class Copies {
  using S = Slot<kBlock, kScale>;
  using Scales = typename S::Scales;
  static constexpr int kBlocks = kChunk / kBlock;

 public:
  __device__ __forceinline__ Copies(const Dot& d, int64_t first_row, int row_step, int first, int step, int end,
                                    S* slots)
      : d_(d), row_(first_row), row_step_(row_step), first_(first), step_(step), end_(end), slots_(slots) {
    begin_rows();
  }

  // What lies beyond the last column or row is copied from before it: it meets zeros of x, or is not used.
  __device__ __forceinline__ void next() {
    if (first_ < end_ && row_ < d_.w.rows) {
      const int row = threadIdx.x % kWarp / 4, unit = threadIdx.x % 4;
      S& to = slots_[slot_];
      slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        copy_async<16>(to.codes + (row + 8 * r) * kChunkBytes + exchanged(row, unit) * int4::kGroupBytes,
                       codes_[r] + min(chunk_ * 4 + unit, last_unit_));
      }
      copy_scales(to);
      chunk_ += step_;
      if (chunk_ >= end_) {
        row_ += row_step_;
        begin_rows();
      }
    }
    group_copies();
  }

 private:
  __device__ __forceinline__ void begin_rows() {
    const int lane = threadIdx.x % kWarp;
    const int64_t last = d_.w.rows - 1, groups = int4::groups(d_.w.columns);
#pragma unroll
    for (int r = 0; r < 2; r++) codes_[r] = (const uint4*)d_.w.codes + min(row_ + lane / 4 + 8 * r, last) * groups;
    const int64_t blocks = int4::blocks(d_.w.columns, kBlock);
    scales_ = (const typename Float<kScale>::Bits*)d_.w.scales + min(row_ + lane % kWarpRows, last) * blocks;
    chunk_ = first_;
    last_unit_ = (int)groups - 1;
  }

  __device__ __forceinline__ void copy_scales(S& to) const {
    const int lane = threadIdx.x % kWarp;
    if (lane >= kWarpRows) return;
    if (d_.scales_aligned) {
      copy_async<sizeof(Scales)>(&to.scales[lane], scales_ + chunk_ * kBlocks);
      return;
    }
    const int left = (int)int4::blocks(d_.w.columns, kBlock) - chunk_ * kBlocks;
    Scales some = {};
#pragma unroll
    for (int i = 0; i < kBlocks; i++) {
      if (i < left) some.at[i] = scales_[chunk_ * kBlocks + i];
    }
    to.scales[lane] = some;
  }

  const Dot& d_;
  int64_t row_;
  const int row_step_, first_, step_, end_;
  S* const slots_;
  const uint4* codes_[2];  // of the rows that the lane copies
  const typename Float<kScale>::Bits* scales_;
  int chunk_, last_unit_, slot_ = 0;
};

template <int kTiles, int kBlock, Dtype kScale>
__global__ void __launch_bounds__(kWarps* kWarp, 1) dot_kernel(const __grid_constant__ Dot d) {
  constexpr int kBlocks = kChunk / kBlock;        // of a chunk
  constexpr int kWords = kBlock / int4::kGroup;   // of a block's codes in each of four lanes
  constexpr int kSlots = kAhead<kTiles>;
  using S = Slot<kBlock, kScale>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int k_warps = 1 << d.log_k_warps, k_warp = warp & (k_warps - 1), row_warp = warp >> d.log_k_warps;
  const int split = 1 << d.log_split, block_rows = d.block_rows();
  const unsigned rank = blockIdx.x & (split - 1);
  const int64_t first_row = (int64_t)(blockIdx.x >> d.log_split) * block_rows;
  const int row_step = (int)(gridDim.x >> d.log_split) * block_rows;
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  const int first = (int)(chunks * rank >> d.log_split), end = (int)(chunks * (rank + 1) >> d.log_split);

  auto* const all_slots = (S*)shared_memory();
  S* const slots = all_slots + warp * kSlots;
  auto* partial = (float*)(all_slots + blockDim.x / kWarp * kSlots);  // [k_warps][columns][partial_stride]
  auto* x = (uint16_t*)(partial + k_warps * d.columns * d.partial_stride());
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

  let_next_kernel_begin();
  wait_for_kernel_before();
  Copies<kSlots, kBlock, kScale> copies(d, first_row + row_warp * kWarpRows, row_step, first + k_warp, k_warps, end,
                                         slots);
  int slot = 0;
  for (int64_t row = first_row; row < d.w.rows; row += row_step) {
    float sums[kTiles][4] = {};
    int chunk = first + k_warp;
    for (int begin = first; begin < end; begin += d.stage) {
      const bool at_first = row == first_row && begin == first;
      if (at_first || d.stage < end - first) {
        if (!at_first) __syncthreads();
        stage(d, begin, x);
        group_copies();
        if (at_first) {
#pragma unroll 1
          for (int i = 0; i < kSlots; i++) copies.next();
        }
        at_first ? wait_for_groups<kSlots>() : wait_for_groups<0>();
        __syncthreads();
      }
      for (; chunk < min(begin + d.stage, end); chunk += k_warps) {
        wait_for_groups<kSlots - 1>();
        __syncwarp();
        const int in_stage = chunk - begin;
        const S& from = slots[slot];
        slot = slot + 1 == kSlots ? 0 : slot + 1;
        const typename S::Scales scale[2] = {from.scales[g], from.scales[g + 8]};
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          Decoded rows[2][kWords];
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const auto words = *(const Pack<uint32_t, kWords>*)(from.codes + bytes[b] + r * 8 * kChunkBytes);
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
            for (int i = 0; i < 4; i++) sums[tile][i] += Float<kScale>::widen(scale[i / 2].at[b]) * sum[i];
          }
        }
        __syncwarp();
        copies.next();
      }
    }

    const int stride = d.partial_stride();
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = tile * kTile + t * 2 + i % 2, r = row_warp * kWarpRows + g + i / 2 * 8;
        if (column < d.columns) partial[(k_warp * d.columns + column) * stride + r] = sums[tile][i];
      }
    }
    d.log_split ? cluster_barrier() : __syncthreads();
    for (int m = warp; m < d.rows; m += blockDim.x / kWarp) {
      for (int r = rank * kWarp + lane; r < block_rows; r += split * kWarp) {
        const int64_t n = row + r;
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
    d.log_split ? cluster_barrier() : __syncthreads();  // the others still read
  }
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
  using S = Slot<kBlock, kScale>;
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  int log_parts = 0;
  while (log_parts < kLogParts && 2 << log_parts <= chunks) log_parts++;
  d.log_split = device.is_hopper_or_later() && d.columns >= kColumnsToSplit && log_parts > 0;
  d.log_k_warps = log_parts - d.log_split;
  const int split = 1 << d.log_split, of_block = (int)((chunks + split - 1) / split);

  int rounds = 1;  // of a warp's chunks, whose x is in shared memory
  const auto bytes = [&] {
    const int k_warps = 1 << d.log_k_warps;
    d.stage = rounds * k_warps;
    d.x_pieces = divisor(d.stage * (kChunk / kPiece));
    return d.row_warps * k_warps * kAhead<kTiles> * (int)sizeof(S) +
           k_warps * d.columns * d.partial_stride() * (int)sizeof(float) +
           d.columns * d.x_stride() * (int)sizeof(uint16_t);
  };
  d.row_warps = kWarps >> d.log_k_warps;
  while (bytes() > device.shared_bytes && d.log_k_warps > 0) {
    d.log_k_warps--;
    d.row_warps = kWarps >> d.log_k_warps;
  }
  const auto row_blocks = [&] { return (d.w.rows + d.block_rows() - 1) / d.block_rows(); };
  while (d.row_warps > 1 && row_blocks() * split < kBlocksToFill) d.row_warps /= 2;
  const int k_warps = 1 << d.log_k_warps;
  rounds = (of_block + k_warps - 1) / k_warps;
  while (rounds > 1 && bytes() > device.shared_bytes) rounds = (rounds + 1) / 2;
  const int shared_bytes = bytes();
  // As many as run at once, so that x is brought once and codes are always on the way. 11008 x 4096 with a row of x take
  // an H200 13.9 us, and 16.7 in blocks that end after their first rows.
  const int64_t blocks = min(row_blocks(), max((int64_t)1, (int64_t)device.processors / split)) * split;
  const Launch how = {dim3((unsigned)blocks), (unsigned)(d.row_warps * k_warps * kWarp), shared_bytes, stream,
                      (unsigned)split, true};
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
  const int chunk_blocks = kChunk / w.block;
  d.scales_aligned = int4::blocks(w.columns, w.block) % chunk_blocks == 0 &&
                     (uintptr_t)w.scales % (chunk_blocks * (w.float32_scales ? 4 : 2)) == 0;
  const Device& device = current_device();
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
