// float32 and bfloat16 to int4 and back: the CPU's bits.
#include "int4.h"

#include "floats.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;

static_assert(kWarp == int4::kGroup, "a lane for each element of a group");

__device__ float element(const void* values, Dtype dtype, int64_t index) {
  return dtype == kFloat32 ? ((const float*)values)[index] : int4::bfloat16_to_float(((const uint16_t*)values)[index]);
}

// A warp for each block of a row.
__global__ void quantize_kernel(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block,
                                bool float32_scales, uint8_t* codes, void* scales) {
  const int64_t blocks = int4::blocks(columns, block);
  const int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / kWarp;
  if (warp >= rows * blocks) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = warp / blocks, begin = warp % blocks * block;

  float values[2] = {};
  uint32_t absmax = 0;  // as integers, magnitudes order like floats with infinity and NaN above them all
  for (int g = 0; g < block / int4::kGroup; g++) {
    const int64_t column = begin + g * int4::kGroup + lane;
    if (column < columns) values[g] = element(weight, dtype, row * columns + column);
    absmax = max(absmax, int4::float_bits(values[g]) & 0x7fffffff);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) absmax = max(absmax, __shfl_xor_sync(kAllLanes, absmax, offset));

  float s = int4::bits_float(absmax) / int4::kMaxCode;
  if (float32_scales) {
    if (lane == 0) ((float*)scales)[warp] = s;
  } else {
    const uint16_t half = int4::float_to_half(s);
    if (lane == 0) ((uint16_t*)scales)[warp] = half;
    s = int4::half_to_float(half);
  }
  const bool usable = s > 0 && s <= 3.402823466e38f;
  for (int g = 0; g < block / int4::kGroup; g++) {
    const int64_t group = begin + g * int4::kGroup;
    if (group >= columns) break;
    int q = 0;
    if (usable) q = (int)rintf(fminf(fmaxf(values[g] / s, -int4::kMaxCode), int4::kMaxCode));
    const int nibble = q + int4::kZeroNibble;
    const int high = __shfl_down_sync(kAllLanes, nibble, int4::kGroupBytes);
    if (lane < int4::kGroupBytes) {
      codes[row * int4::row_bytes(columns) + group / int4::kGroup * int4::kGroupBytes + lane] = nibble | high << 4;
    }
  }
}

// A thread for each byte of codes.
__global__ void dequantize_kernel(Weight w, Dtype dtype, void* out) {
  const int64_t row_bytes = int4::row_bytes(w.columns);
  const int64_t index = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= w.rows * row_bytes) return;
  const int64_t row = index / row_bytes, byte = index % row_bytes;
  const int64_t first = byte / int4::kGroupBytes * int4::kGroup + byte % int4::kGroupBytes;
  const int64_t scale = row * int4::blocks(w.columns, w.block) + first / w.block;
  const float s =
      w.float32_scales ? ((const float*)w.scales)[scale] : int4::half_to_float(((const uint16_t*)w.scales)[scale]);
  for (int half = 0; half < 2; half++) {
    const int64_t column = first + half * int4::kGroupBytes;
    if (column >= w.columns) return;
    const float value = ((w.codes[index] >> 4 * half & 15) - int4::kZeroNibble) * s;
    if (dtype == kFloat32) {
      ((float*)out)[row * w.columns + column] = value;
    } else {
      ((uint16_t*)out)[row * w.columns + column] = int4::float_to_bfloat16(value);
    }
  }
}

cudaLaunchConfig_t one_thread_each(int64_t count, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)((count + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = (cudaStream_t)stream;
  return config;
}

}  // namespace

int int4_quantize_cuda(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                       uint8_t* codes, void* scales, void* stream) {
  const int64_t threads = rows * int4::blocks(columns, block) * kWarp;
  if (threads == 0) return cudaSuccess;
  const cudaLaunchConfig_t config = one_thread_each(threads, stream);
  return cudaLaunchKernelEx(&config, quantize_kernel, weight, dtype, rows, columns, block, float32_scales, codes, scales);
}

int int4_dequantize_cuda(const Weight& weight, Dtype dtype, void* out, void* stream) {
  const int64_t threads = weight.rows * int4::row_bytes(weight.columns);
  if (threads == 0) return cudaSuccess;
  const cudaLaunchConfig_t config = one_thread_each(threads, stream);
  return cudaLaunchKernelEx(&config, dequantize_kernel, weight, dtype, out);
}

}  // namespace entrenar
