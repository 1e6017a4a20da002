// Products in bfloat16 with an adapter's rank for one side.
#include "skinny.h"

#include <algorithm>

#include "floats.h"
#include "mma.h"

namespace entrenar {

namespace {

using BFloat16 = Float<kBFloat16>;
using Octet = Pack<uint32_t, 4>;  // 8 elements of a row

constexpr int kMostTiles = 4;  // whose sums fit a kernel's registers: more ranks are as many passes

// Zeros from `columns` on. Where rows are `wide`, that is begin at multiples of 16 bytes, so does each octet.
template <bool wide>
__device__ Octet load_octet(const uint16_t* row, int64_t column, int64_t columns) {
  Octet octet = {};
  if constexpr (wide) {
    if (column < columns) octet = *(const Octet*)(row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (column + i < columns) octet.at[i / 2] |= (uint32_t)row[column + i] << i % 2 * 16;
    }
  }
  return octet;
}

__global__ void factor_kernel(const float* from, int64_t rank, int64_t columns, int64_t row_stride,
                              int64_t column_stride, uint16_t* out) {
  const int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  for (int64_t r = blockIdx.y; r < rank; r += gridDim.y) {
    out[r * columns + c] = BFloat16::narrow(from[r * row_stride + c * column_stride]);
  }
}

// A block's warps share 32 rows of x and 8 * tiles ranks; each takes every 16th step of 64 columns. Within a step the
// order of columns does not matter to a sum, so that each lane may feed the tensor cores what it read in one piece.
constexpr int kProjectWarps = 16;
constexpr int kProjectRows = 32;
constexpr int kStep = 64;

template <int tiles, bool wide>
__global__ void __launch_bounds__(kProjectWarps * kWarp)
    project_kernel(const uint16_t* x, const uint16_t* factor, int64_t rows, int64_t columns, int64_t rank, float scale,
                   uint16_t* out) {
  auto* partial = (float(*)[kProjectRows * 8])shared_memory();  // of each warp
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t first_row = (int64_t)blockIdx.x * kProjectRows, first_rank = (int64_t)blockIdx.y * 8 * tiles;

  // Past the last row and rank, it is read again: what comes of that is not stored.
  float sums[tiles][2][4] = {};
  for (int64_t column = (int64_t)warp * kStep + 8 * t; column - 8 * t < columns; column += kProjectWarps * kStep) {
    Octet rows_of_x[4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint16_t* row = x + min(first_row + 8 * i + g, rows - 1) * columns;
#pragma unroll
      for (int h = 0; h < 2; h++) rows_of_x[i][h] = load_octet<wide>(row, column + 32 * h, columns);
    }
#pragma unroll
    for (int j = 0; j < tiles; j++) {
      const uint16_t* row = factor + min(first_rank + 8 * j + g, rank - 1) * columns;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const Octet of_rank = load_octet<wide>(row, column + 32 * h, columns);
#pragma unroll
        for (int word = 0; word < 4; word += 2) {  // 16 columns: two words of the octet of each lane
          const uint32_t b[2] = {of_rank.at[word], of_rank.at[word + 1]};
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const Octet &upper = rows_of_x[2 * half][h], &lower = rows_of_x[2 * half + 1][h];
            const uint32_t a[4] = {upper.at[word], lower.at[word], upper.at[word + 1], lower.at[word + 1]};
            mma_bf16_16x8x16(sums[j][half], a, b);
          }
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < tiles; j++) {
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        partial[warp][(16 * half + g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[j][half][i];
      }
    }
    __syncthreads();
    const int64_t row = first_row + threadIdx.x / 8, r = first_rank + 8 * j + threadIdx.x % 8;
    if (threadIdx.x < kProjectRows * 8 && row < rows && r < rank) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kProjectWarps; w++) sum += partial[w][threadIdx.x];
      out[row * rank + r] = BFloat16::narrow(sum * scale);
    }
  }
}

// A block's warps share 64 columns, 16 * tiles ranks and a part of the rows; each takes every 8th step of 16 rows.
constexpr int kOuterWarps = 8;
constexpr int kOuterColumns = 64;
constexpr int kOuterStep = 16;
constexpr int kOuterBlocks = 256;  // wanted, to fill a GPU twice

template <int tiles, bool wide>
__global__ void __launch_bounds__(kOuterWarps * kWarp)
    outer_kernel(const uint16_t* narrow, const uint16_t* x, int64_t rows, int64_t rank, int64_t columns,
                 int64_t part_rows, bool transposed, float* out) {
  auto* partial = (float(*)[16 * kOuterColumns])shared_memory();  // of each warp
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t first_column = (int64_t)blockIdx.x * kOuterColumns, first_rank = (int64_t)blockIdx.z * 16 * tiles;
  const int64_t end = min(rows, (blockIdx.y + 1) * part_rows);
  out += blockIdx.y * rank * columns;

  float sums[tiles][8][4] = {};
  for (int64_t first = blockIdx.y * part_rows + warp * kOuterStep; first < end; first += kOuterWarps * kOuterStep) {
    // A lane reads rows 4t to 4t + 3, which stand for the tensor cores' 2t, 2t + 1, 2t + 8 and 2t + 9 in both factors,
    // and of them columns 8g to 8g + 7, each of which stands for column g of another tile.
    const int64_t row = first + 4 * t;
    Octet wides[4];
    uint16_t narrows[tiles][4][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool inside = row + i < end;
      wides[i] = inside ? load_octet<wide>(x + (row + i) * columns, first_column + 8 * g, columns) : Octet{};
#pragma unroll
      for (int j = 0; j < tiles; j++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int64_t r = first_rank + 16 * j + 8 * half + g;
          narrows[j][i][half] = inside && r < rank ? narrow[(row + i) * rank + r] : 0;
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

#pragma unroll
  for (int j = 0; j < tiles; j++) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 8; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        partial[warp][(g + i / 2 * 8) * kOuterColumns + 8 * (2 * t + i % 2) + c] = sums[j][c][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * kOuterColumns; i += kOuterWarps * kWarp) {
      const int64_t r = first_rank + 16 * j + i / kOuterColumns, column = first_column + i % kOuterColumns;
      if (r >= rank || column >= columns) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kOuterWarps; w++) sum += partial[w][i];
      out[transposed ? column * rank + r : r * columns + column] = sum;
    }
  }
}

__global__ void sum_kernel(const float* parts, int count, int64_t numel, float* out) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= numel) return;
  float sum = 0;
  for (int part = 0; part < count; part++) sum += parts[part * numel + i];
  out[i] = sum;
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

cudaLaunchConfig_t launch(dim3 grid, unsigned threads, size_t shared_bytes, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = (cudaStream_t)stream;
  return config;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_wide(const uint16_t* memory, int64_t columns) { return (uintptr_t)memory % 16 == 0 && columns % 8 == 0; }

}  // namespace

int skinny_factor_cuda(const float* from, int64_t rank, int64_t columns, int64_t row_stride, int64_t column_stride,
                       uint16_t* out, void* stream) {
  if (rank == 0 || columns == 0) return cudaSuccess;
  const dim3 grid((unsigned)divide_up(columns, 256), (unsigned)std::min<int64_t>(rank, 65535));
  const cudaLaunchConfig_t config = launch(grid, 256, 0, stream);
  return cudaLaunchKernelEx(&config, factor_kernel, from, rank, columns, row_stride, column_stride, out);
}

int skinny_project_cuda(const uint16_t* x, const uint16_t* factor, int64_t rows, int64_t columns, int64_t rank,
                        float scale, uint16_t* out, void* stream) {
  if (rows == 0 || rank == 0) return cudaSuccess;
  const bool wide = is_wide(x, columns) && is_wide(factor, columns);
  return specialized<8>(rank, wide, [&](auto tiles, auto constant_wide) {
    constexpr int kTiles = decltype(tiles)::value;
    const dim3 grid((unsigned)divide_up(rows, kProjectRows), (unsigned)divide_up(rank, 8 * kTiles));
    const size_t shared_bytes = kProjectWarps * kProjectRows * 8 * sizeof(float);
    const cudaLaunchConfig_t config = launch(grid, kProjectWarps * kWarp, shared_bytes, stream);
    return (int)cudaLaunchKernelEx(&config, project_kernel<kTiles, decltype(constant_wide)::value>, x, factor, rows,
                                   columns, rank, scale, out);
  });
}

int64_t skinny_outer_parts(int64_t rows, int64_t columns) {
  const int64_t wanted = kOuterBlocks / std::max<int64_t>(1, divide_up(columns, kOuterColumns));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, rows / (kOuterWarps * kOuterStep)));
}

int skinny_outer_cuda(const uint16_t* narrow, const uint16_t* x, int64_t rows, int64_t rank, int64_t columns,
                      bool transposed, float* parts, float* out, void* stream) {
  if (rank == 0 || columns == 0) return cudaSuccess;
  const int64_t count = skinny_outer_parts(rows, columns);
  const int64_t part_rows = divide_up(divide_up(rows, count), kOuterStep) * kOuterStep;
  const int launched = specialized<16>(rank, is_wide(x, columns), [&](auto tiles, auto constant_wide) {
    constexpr int kTiles = decltype(tiles)::value;
    const dim3 grid((unsigned)divide_up(columns, kOuterColumns), (unsigned)count,
                    (unsigned)divide_up(rank, 16 * kTiles));
    const size_t shared_bytes = kOuterWarps * 16 * kOuterColumns * sizeof(float);
    const cudaLaunchConfig_t config = launch(grid, kOuterWarps * kWarp, shared_bytes, stream);
    return (int)cudaLaunchKernelEx(&config, outer_kernel<kTiles, decltype(constant_wide)::value>, narrow, x, rows, rank,
                                   columns, part_rows, transposed, count > 1 ? parts : out);
  });
  if (launched != cudaSuccess || count == 1) return launched;
  const cudaLaunchConfig_t config = launch(dim3((unsigned)divide_up(rank * columns, 256)), 256, 0, stream);
  return cudaLaunchKernelEx(&config, sum_kernel, (const float*)parts, (int)count, rank * columns, out);
}

}  // namespace entrenar
