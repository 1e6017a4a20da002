// dx = dy W, or dx += dy W, for up to 8 rows of dy.
//
// A warp computes 128 columns of dx, by tensor cores, from 32 rows of W at a time: the codes q, exact in bfloat16, are
// the matrix of 16 columns of W, pairs of them from two rows, and rows of dy the matrix of 8 columns. Scales change along
// the sum, so dy is multiplied by them, and rounded to bfloat16 as W would be; of a float32 dy the product is the sum of
// three bfloat16 numbers.
//
// Codes come as in dot.cu. The order of W's rows in an instruction is free: a lane takes rows t, t + 4, t + 8, t + 12 of
// sixteen, and dy and the scales are staged so that those lie side by side.
#include "dot.h"

#include "few_rows.h"

namespace entrenar {

namespace {

constexpr int kWarps = 8;
constexpr int kStep = 32;       // rows of W that a warp reads at once
constexpr int kAhead = 4;       // steps whose codes are on the way
constexpr int kRound = kWarps * kStep;
constexpr int kPiece = 16;      // rows of W whose dy a thread stages at once
constexpr int kBlock = 64;
constexpr int kBlocks = kChunk / kBlock;
constexpr int kSlotBytes = kStep * kChunkBytes;
constexpr int kLogSplit = 2;    // blocks of a cluster, over W's rows, where there are clusters

struct DotGradient {
  Weight w;
  Dtype dtype;
  const void* dy;
  bool add_to_dx;
  void* dx;
  int rows;       // of dy
  int log_split;  // blocks of a cluster, over W's rows
  int slots;      // steps of codes in a warp's shared memory
  int stage;      // rows of W whose scales and whose columns of dy are in shared memory: whole rounds
  bool dy_aligned;

  // Rows of dy then lie in different banks.
  __host__ __device__ int stride() const { return stage + kPiece; }
};

__device__ __forceinline__ float scale_at(const Weight& w, int64_t at) {
  return w.float32_scales ? ((const float*)w.scales)[at] : Float<kFloat16>::widen(((const uint16_t*)w.scales)[at]);
}

// dy, as float32, and the scales of the chunk's blocks for W's rows from `begin` on; zeros from `end` on.
__device__ __forceinline__ void stage(const DotGradient& d, int64_t chunk, int begin, int end, float* dy,
                                      float* scales) {
  for (int m = 0; m < d.rows; m++) {
    for (int i = threadIdx.x * kPiece; i < d.stage; i += blockDim.x * kPiece) {
      const int n = begin + i;
      const int64_t at = m * d.w.rows + n;
      float values[kPiece];
      if (d.dy_aligned && n + kPiece <= end) {
#pragma unroll
        for (int h = 0; h < kPiece; h += 8) {
          const auto eight = *(const Pack<uint16_t, 8>*)((const uint16_t*)d.dy + at + h);
#pragma unroll
          for (int j = 0; j < 8; j++) values[h + j] = int4::bfloat16_to_float(eight.at[j]);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPiece; j++) {
          values[j] = n + j >= end            ? 0.0f
                      : d.dtype == kBFloat16 ? int4::bfloat16_to_float(((const uint16_t*)d.dy)[at + j])
                                             : ((const float*)d.dy)[at + j];
        }
      }
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const Pack<float, 4> of_lane = {{values[t], values[t + 4], values[t + 8], values[t + 12]}};
        *(Pack<float, 4>*)(dy + m * d.stride() + i + 4 * t) = of_lane;
      }
    }
  }
  const int64_t blocks = int4::blocks(d.w.columns, kBlock);
  for (int i = threadIdx.x; i < d.stage; i += blockDim.x) {
    const int staged = (i & ~15) | (i & 3) << 2 | (i >> 2 & 3);
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      const int64_t block = chunk * kBlocks + b;
      const bool exists = begin + i < end && block < blocks;
      scales[b * d.stage + staged] = exists ? scale_at(d.w, (begin + i) * blocks + block) : 0.0f;
    }
  }
}

// kParts: the bfloat16 numbers whose sum is an element of dy times a scale.
template <int kParts>
__global__ void __launch_bounds__(kRound, 1) dot_gradient_kernel(const __grid_constant__ DotGradient d) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int split = 1 << d.log_split;
  const unsigned rank = blockIdx.x & (split - 1);
  const int64_t chunk = blockIdx.x >> d.log_split;
  const int64_t steps = (d.w.rows + kStep - 1) / kStep;
  const int first = (int)(steps * rank >> d.log_split) * kStep;
  const int end = (int)min((steps * (rank + 1) >> d.log_split) * kStep, d.w.rows);

  auto* dy = (float*)shared_memory();
  float* scales = dy + d.rows * d.stride();
  char* slots = (char*)(scales + kBlocks * d.stage) + warp * d.slots * kSlotBytes;

  // A lane copies 16 bytes of every eighth row. What lies beyond the last row meets zeros, beyond the last column it is
  // not used.
  const int64_t groups = int4::groups(d.w.columns);
  const uint4* codes = (const uint4*)d.w.codes + min(chunk * 4 + t, groups - 1);
  char* to = slots + g * kChunkBytes + exchanged(g, t) * int4::kGroupBytes;
  int row = first + warp * kStep, to_copy = row, slot = 0, copy_slot = 0;
  const auto copy_next = [&] {
    if (to_copy < end) {
#pragma unroll
      for (int r = 0; r < kStep; r += 8) {
        const uint4* from = codes + min(to_copy + g + r, end - 1) * groups;
        copy_async<16>(to + copy_slot * kSlotBytes + r * kChunkBytes, from);
      }
    }
    group_copies();
    to_copy += kRound;
    copy_slot = copy_slot + 1 == d.slots ? 0 : copy_slot + 1;
  };
  let_next_kernel_begin();
  wait_for_kernel_before();
#pragma unroll 1
  for (int i = 0; i < kAhead; i++) copy_next();

  // What lies beyond the last row of dy is computed from it, and not used.
  const float* dy_of_lane = dy + min(g, d.rows - 1) * d.stride();
  float sums[kBlocks][4][4] = {};
  for (int begin = first; begin < end; begin += d.stage) {
    if (begin > first) __syncthreads();
    stage(d, chunk, begin, end, dy, scales);
    __syncthreads();
    for (; row < min(begin + d.stage, end); row += kRound) {
      wait_for_groups<kAhead - 1>();
      __syncwarp();
      const char* at = slots + slot * kSlotBytes + g % 4 * 4;
#pragma unroll
      for (int half = 0; half < kStep; half += 16) {
        const int staged = row - begin + half + t * 4;
        const auto of_dy = *(const Pack<float, 4>*)(dy_of_lane + staged);
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
          const auto scale = *(const Pack<float, 4>*)(scales + b * d.stage + staged);
          float products[4];
#pragma unroll
          for (int j = 0; j < 4; j++) products[j] = of_dy.at[j] * scale.at[j];
          uint32_t scaled[kParts][2];
          if constexpr (kParts == 1) {
            for (int j = 0; j < 2; j++) scaled[0][j] = narrowed_pair(products[2 * j], products[2 * j + 1]);
          } else {
            uint16_t parts[4][kParts];
#pragma unroll
            for (int j = 0; j < 4; j++) to_parts(products[j], parts[j]);
#pragma unroll
            for (int p = 0; p < kParts; p++) {
              for (int j = 0; j < 2; j++) scaled[p][j] = parts[2 * j][p] | (uint32_t)parts[2 * j + 1][p] << 16;
            }
          }
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const int r = half + t + 4 * j, unit = exchanged(r, b * kBlock / int4::kGroup + g / 4);
            words[j] = *(const uint32_t*)(at + r * kChunkBytes + unit * int4::kGroupBytes);
          }
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const uint32_t byte = i | (4 + i) << 8;
            const uint32_t upper = __byte_perm(words[0], words[1], byte), lower = __byte_perm(words[2], words[3], byte);
            const uint32_t a[4] = {low_nibbles(upper), high_nibbles(upper), low_nibbles(lower), high_nibbles(lower)};
#pragma unroll
            for (int p = kParts - 1; p >= 0; p--) mma_bf16_16x8x16(sums[b][i], a, scaled[p]);
          }
        }
      }
      __syncwarp();
      slot = slot + 1 == d.slots ? 0 : slot + 1;
      copy_next();
    }
  }
  __syncthreads();

  auto* partial = (float*)shared_memory();  // [kWarps][rows][kChunk]
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int m = 2 * t + j % 2;
        const int column = b * kBlock + g / 4 * int4::kGroup + g % 4 * 4 + i + j / 2 * int4::kGroupBytes;
        if (m < d.rows) partial[(warp * d.rows + m) * kChunk + column] = sums[b][i][j];
      }
    }
  }
  d.log_split ? cluster_barrier() : __syncthreads();
  for (int i = rank * blockDim.x + threadIdx.x; i < d.rows * kChunk; i += split * blockDim.x) {
    const int64_t column = chunk * kChunk + i % kChunk, at = i / kChunk * d.w.columns + column;
    if (column >= d.w.columns) continue;
    float sum = 0;
    for (int q = 0; q < split; q++) {
      const float* of_rank = d.log_split ? of_block(partial, q) : partial;
      for (int w = 0; w < kWarps; w++) sum += of_rank[w * d.rows * kChunk + i];
    }
    sum *= kCodeOfQuarter;
    if (d.dtype == kFloat32) {
      float& dx = ((float*)d.dx)[at];
      dx = d.add_to_dx ? dx + sum : sum;
    } else {
      uint16_t& dx = ((uint16_t*)d.dx)[at];
      dx = Float<kBFloat16>::narrow(d.add_to_dx ? int4::bfloat16_to_float(dx) + sum : sum);
    }
  }
  if (d.log_split) cluster_barrier();  // the others still read
}

template <int kParts>
int plan_and_launch(DotGradient d, void* stream) {
  const Device& device = current_device();
  const int64_t steps = (d.w.rows + kStep - 1) / kStep;
  while (device.is_hopper_or_later() && d.log_split < kLogSplit && 2 << d.log_split <= steps) d.log_split++;
  const int split = 1 << d.log_split;
  const int rounds = (int)(((steps + split - 1) / split + kWarps - 1) / kWarps);
  d.slots = min(kAhead, rounds);
  const auto bytes = [&](int rounds_of_stage) {
    d.stage = rounds_of_stage * kRound;
    return (d.rows * d.stride() + kBlocks * d.stage) * (int)sizeof(float) + kWarps * d.slots * kSlotBytes;
  };
  int staged = rounds;
  while (staged > 1 && bytes(staged) > device.shared_bytes) staged = (staged + 1) / 2;
  const int shared_bytes = bytes(staged), partial_bytes = kWarps * d.rows * kChunk * (int)sizeof(float);
  const int64_t chunks = (d.w.columns + kChunk - 1) / kChunk;
  const Launch how = {dim3((unsigned)(chunks * split)), kRound, max(shared_bytes, partial_bytes), stream,
                      (unsigned)split, true};
  return launch<dot_gradient_kernel<kParts>>(device, how, d);
}

}  // namespace

bool int4_dot_gradient_takes(const Weight& w, int64_t rows) {
  return rows <= kTile && w.block == kBlock && w.rows <= INT32_MAX - kRound * kAhead &&
         (uintptr_t)w.codes % sizeof(uint4) == 0 && (uintptr_t)w.scales % (w.float32_scales ? 4 : 2) == 0;
}

int int4_dot_gradient_cuda(const Weight& w, Dtype dtype, const void* dy, int64_t rows, bool add_to_dx, void* dx,
                           void* stream) {
  if (rows == 0 || w.columns == 0) return cudaSuccess;
  DotGradient d = {};
  d.w = w;
  d.dtype = dtype;
  d.dy = dy;
  d.add_to_dx = add_to_dx;
  d.dx = dx;
  d.rows = (int)rows;
  d.dy_aligned = dtype == kBFloat16 && w.rows % 8 == 0 && (uintptr_t)dy % 16 == 0;
  return dtype == kFloat32 ? plan_and_launch<3>(d, stream) : plan_and_launch<1>(d, stream);
}

}  // namespace entrenar
