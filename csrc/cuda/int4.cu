// float32 and bfloat16 to int4 and back: the CPU's bits.
#include "int4.h"

#include <algorithm>

#include "floats.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;

// Units of a thread: several, so that as many loads are in flight.
template <bool wide>
constexpr int kUnitsOf = wide ? 2 : 1;

// A thread's unit of a group is a run of its code bytes: their low nibbles stand for elements that fill 16 bytes of the
// matrix, and so do the high ones. Neighbouring threads then fill whole sectors of memory by its widest accesses.
template <Dtype dtype>
struct Unit {
  using Bits = typename Float<dtype>::Bits;
  static constexpr int kBytes = 16 / sizeof(Bits);
  static constexpr int kOfGroup = int4::kGroupBytes / kBytes;
  using Codes = Pack<uint8_t, kBytes>;
  using Elements = Pack<Bits, kBytes>;

  int64_t byte, column;  // where it begins in the row of codes, and its low elements in the row of the matrix

  __device__ Unit(int index, int units)
      : byte((((int64_t)blockIdx.x * units + index) * blockDim.x + threadIdx.x) * kBytes),
        column(byte / int4::kGroupBytes * int4::kGroup + byte % int4::kGroupBytes) {}

  // Elements [column, column + kBytes) of a row, zeros from `columns` on. Where rows are `wide`, that is begin at
  // multiples of 16 bytes, a run that begins in one also ends there, if need be in what pads it.
  template <bool wide>
  static __device__ Elements load(const Bits* row, int64_t column, int64_t columns) {
    Elements run = {};
    if constexpr (wide) {
      if (column < columns) run = *(const Elements*)(row + column);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes; i++) {
        if (column + i < columns) run.at[i] = row[column + i];
      }
    }
    return run;
  }

  template <bool wide>
  static __device__ void store(const Elements& run, Bits* row, int64_t column, int64_t columns) {
    if constexpr (wide) {
      uint4 words;
      __builtin_memcpy(&words, &run, sizeof words);
      if (column < columns) __stcg((uint4*)(row + column), words);  // a plain store, the compiler may cut in four
    } else {
#pragma unroll
      for (int i = 0; i < kBytes; i++) {
        if (column + i < columns) row[column + i] = run.at[i];
      }
    }
  }
};

__device__ int64_t first_row() { return (int64_t)blockIdx.y * blockDim.y + threadIdx.y; }
__device__ int64_t row_step() { return (int64_t)gridDim.y * blockDim.y; }

// 1.5 * 2^23: added to a small float, it rounds it half to even into the last bits of the sum.
constexpr float kMagic = 12582912.0f;

// A value in units of the scale s, rounded to a code from `least` on, plus kMagic.
__device__ float code_of(float value, float s, int least) {
  return fminf(fmaxf(value / s, least), int4::kMaxCode) + kMagic;
}

__device__ uint32_t nibble_of(float code) { return (int4::float_bits(code) + int4::kZeroNibble) & 15; }

__device__ bool is_usable(float s) { return fabsf(s) > 0 && fabsf(s) <= 3.402823466e38f; }

template <Dtype dtype, Dtype scale_dtype, int block, bool wide>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const typename Float<dtype>::Bits* weight, int64_t rows, int64_t columns, uint8_t* codes,
                    typename Float<scale_dtype>::Bits* scales) {
  using Unit = Unit<dtype>;
  constexpr int kUnits = kUnitsOf<wide>;
  using F = Float<dtype>;
  using S = Float<scale_dtype>;
  constexpr int kLanes = block / int4::kGroup * Unit::kOfGroup;  // that share a scale
  const int64_t row_bytes = int4::row_bytes(columns), blocks = int4::blocks(columns, block);

  for (int64_t row = first_row(); row < rows; row += row_step()) {
    const auto* from = weight + row * columns;
    typename Unit::Elements runs[kUnits][2];
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      const Unit unit(u, kUnits);
      runs[u][0] = Unit::template load<wide>(from, unit.column, columns);
      runs[u][1] = Unit::template load<wide>(from, unit.column + int4::kGroupBytes, columns);
    }
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      const Unit unit(u, kUnits);
      uint32_t absmax = 0;  // as integers, magnitudes order like floats with infinity and NaN above them all
#pragma unroll
      for (int i = 0; i < 2 * Unit::kBytes; i++) {
        absmax = max(absmax, int4::float_bits(F::widen(runs[u][i / Unit::kBytes].at[i % Unit::kBytes])) & 0x7fffffff);
      }
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        absmax = max(absmax, __shfl_xor_sync(kAllLanes, absmax, offset));
      }
      const auto stored = S::narrow(int4::bits_float(absmax) / int4::kMaxCode);
      const float s = S::widen(stored);
      const bool usable = is_usable(s);
      const float divisor = usable ? s : 1.0f;

      typename Unit::Codes packed;
#pragma unroll
      for (int i = 0; i < Unit::kBytes; i++) {
        uint32_t nibbles[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float code = code_of(F::widen(runs[u][half].at[i]), divisor, -int4::kMaxCode);
          nibbles[half] = usable ? nibble_of(code) : int4::kZeroNibble;
        }
        packed.at[i] = nibbles[0] | nibbles[1] << 4;
      }
      if (unit.byte < row_bytes) {
        *(typename Unit::Codes*)(codes + row * row_bytes + unit.byte) = packed;
        if (unit.byte % (block / 2) == 0) scales[row * blocks + unit.column / block] = stored;
      }
    }
  }
}

// The same with the scale of least squared error, as int4.h describes it. Each block has a thread for each lane of its
// sums, whose elements are also those of its bytes of codes.
template <Dtype dtype, Dtype scale_dtype, int block>
__global__ void __launch_bounds__(kThreads)
    fit_kernel(const typename Float<dtype>::Bits* weight, int64_t rows, int64_t columns, uint8_t* codes,
               typename Float<scale_dtype>::Bits* scales) {
  using S = Float<scale_dtype>;
  constexpr int kLanes = int4::kErrorLanes, kOwn = block / kLanes;
  static_assert(kLanes == int4::kGroupBytes, "a lane's elements share bytes");
  const int64_t blocks = int4::blocks(columns, block);
  const int64_t index = ((int64_t)blockIdx.x * kThreads + threadIdx.x) / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int64_t row = index / blocks, begin = index % blocks * block;
  const bool inside = row < rows;  // threads of a warp exchange values, so that none may leave

  float x[kOwn];
  uint64_t largest = 0;  // its magnitude, how far it is from the block's end, and its sign: the first of equal ones
#pragma unroll
  for (int e = 0; e < kOwn; e++) {
    const int i = e * kLanes + lane;
    x[e] = inside && begin + i < columns ? Float<dtype>::widen(weight[row * columns + begin + i]) : 0;
    const uint32_t bits = int4::float_bits(x[e]);
    const uint64_t key = (uint64_t)(bits & 0x7fffffff) << 32 | (block - 1 - i) << 1 | bits >> 31;
    largest = key > largest ? key : largest;
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = other > largest ? other : largest;
  }
  const float absmax = int4::bits_float((uint32_t)(largest >> 32)), v = largest & 1 ? -absmax : absmax;

  const auto squared_error = [&](float s, int least) {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kOwn; e++) {
      const float error = __fsub_rn(__fmul_rn(code_of(x[e], s, least) - kMagic, s), x[e]);
      sum = __fadd_rn(sum, __fmul_rn(error, error));
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, offset));
    }
    return sum;
  };
  auto stored = S::narrow(absmax / int4::kMaxCode);
  const bool usable = is_usable(S::widen(stored));
  int least = -int4::kMaxCode;
  float error = squared_error(usable ? S::widen(stored) : 1.0f, least);
#pragma unroll
  for (int i = 0; i < int4::kDivisorCount; i++) {
    const auto candidate = S::narrow(-v / int4::divisor(i));
    const bool its_usable = usable && is_usable(S::widen(candidate));
    const float its_error = squared_error(its_usable ? S::widen(candidate) : 1.0f, int4::kMinCode);
    if (its_usable && its_error < error) error = its_error, stored = candidate, least = int4::kMinCode;
  }

  if (!inside) return;
  const float s = usable ? S::widen(stored) : 1.0f;
  uint8_t* bytes = codes + row * int4::row_bytes(columns) + begin / 2;
#pragma unroll
  for (int g = 0; g < block / int4::kGroup; g++) {
    const uint32_t low = nibble_of(code_of(x[2 * g], s, least)), high = nibble_of(code_of(x[2 * g + 1], s, least));
    if (begin + g * int4::kGroup < columns) {
      bytes[g * int4::kGroupBytes + lane] = usable ? low | high << 4 : int4::kZeroByte;
    }
  }
  if (lane == 0) scales[index] = stored;
}

// q s for the codes in the low nibbles of a word's bytes. 0x43u00000 is 128 + u.
__device__ void decode(uint32_t nibbles, float scale, float (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float biased = int4::bits_float(__byte_perm(nibbles, 0x43000000, 0x7044 | i << 8));
    values[i] = (biased - (128 + int4::kZeroNibble)) * scale;
  }
}

template <Dtype dtype, Dtype scale_dtype, int block, bool wide>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* codes, const typename Float<scale_dtype>::Bits* scales, int64_t rows,
                      int64_t columns, typename Float<dtype>::Bits* out, int64_t stride) {
  using Unit = Unit<dtype>;
  using Words = Pack<uint32_t, Unit::kBytes / 4>;
  constexpr int kUnits = kUnitsOf<wide>;
  const int64_t row_bytes = int4::row_bytes(columns), blocks = int4::blocks(columns, block);

  for (int64_t row = first_row(); row < rows; row += row_step()) {
    Words packed[kUnits];
    typename Float<scale_dtype>::Bits s[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      const Unit unit(u, kUnits);
      if (unit.byte >= row_bytes) break;
      packed[u] = *(const Words*)(codes + row * row_bytes + unit.byte);
      s[u] = scales[row * blocks + unit.column / block];
    }
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
      const Unit unit(u, kUnits);
      if (unit.byte >= row_bytes) break;
      const float scale = Float<scale_dtype>::widen(s[u]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        typename Unit::Elements run;
#pragma unroll
        for (int w = 0; w < Unit::kBytes / 4; w++) {
          float values[4];
          decode(packed[u].at[w] >> 4 * half & 0x0f0f0f0f, scale, values);
#pragma unroll
          for (int i = 0; i < 4; i++) run.at[4 * w + i] = Float<dtype>::narrow(values[i]);
        }
        Unit::template store<wide>(run, out + row * stride, unit.column + half * int4::kGroupBytes, columns);
      }
    }
  }
}

// A unit for each thread of a row in x, rows in y.
template <Dtype dtype>
cudaLaunchConfig_t launch_over(int64_t rows, int64_t columns, bool wide, void* stream) {
  const int64_t units = int4::groups(columns) * Unit<dtype>::kOfGroup;
  const unsigned each = wide ? kUnitsOf<true> : kUnitsOf<false>;
  unsigned width = kWarp;
  while (width < kThreads && (int64_t)width * each < units) width *= 2;
  const unsigned height = kThreads / width;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(width, height);
  config.gridDim = dim3((unsigned)((units + width * each - 1) / (width * each)),
                        (unsigned)std::min<int64_t>((rows + height - 1) / height, 65535));
  config.stream = (cudaStream_t)stream;
  return config;
}

// f(scale_dtype, block, wide) with constants: a kernel for each.
template <class F>
int specialized(bool float32_scales, int block, bool wide, const F& f) {
  const auto with_wide = [&](auto scale_dtype, auto constant_block) {
    return wide ? f(scale_dtype, constant_block, std::true_type()) : f(scale_dtype, constant_block, std::false_type());
  };
  const auto with_block = [&](auto scale_dtype) {
    return block == 64 ? with_wide(scale_dtype, std::integral_constant<int, 64>())
                       : with_wide(scale_dtype, std::integral_constant<int, 32>());
  };
  return float32_scales ? with_block(std::integral_constant<Dtype, kFloat32>())
                        : with_block(std::integral_constant<Dtype, kFloat16>());
}

template <Dtype dtype>
int fit(const void* weight, int64_t rows, int64_t columns, int block, bool float32_scales, uint8_t* codes, void* scales,
        void* stream) {
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(kThreads);
  const int64_t threads = rows * int4::blocks(columns, block) * int4::kErrorLanes;
  config.gridDim = dim3((unsigned)((threads + kThreads - 1) / kThreads));
  config.stream = (cudaStream_t)stream;
  return specialized(float32_scales, block, false, [&](auto scale_dtype, auto constant_block, auto) {
    constexpr Dtype kScale = decltype(scale_dtype)::value;
    constexpr auto kernel = fit_kernel<dtype, kScale, decltype(constant_block)::value>;
    return (int)cudaLaunchKernelEx(&config, kernel, (const typename Float<dtype>::Bits*)weight, rows, columns, codes,
                                   (typename Float<kScale>::Bits*)scales);
  });
}

bool aligned(const void* memory, int64_t row_bytes) { return ((uintptr_t)memory | (uintptr_t)row_bytes) % 16 == 0; }

template <Dtype dtype>
int quantize(const void* weight, int64_t rows, int64_t columns, int block, bool float32_scales, uint8_t* codes,
             void* scales, void* stream) {
  using Bits = typename Float<dtype>::Bits;
  const bool wide = aligned(weight, columns * sizeof(Bits));
  const cudaLaunchConfig_t config = launch_over<dtype>(rows, columns, wide, stream);
  return specialized(float32_scales, block, wide, [&](auto scale_dtype, auto constant_block, auto constant_wide) {
    constexpr Dtype kScale = decltype(scale_dtype)::value;
    constexpr auto kernel =
        quantize_kernel<dtype, kScale, decltype(constant_block)::value, decltype(constant_wide)::value>;
    return (int)cudaLaunchKernelEx(&config, kernel, (const Bits*)weight, rows, columns, codes,
                                   (typename Float<kScale>::Bits*)scales);
  });
}

template <Dtype dtype>
int dequantize(const Weight& w, void* out, int64_t stride, void* stream) {
  using Bits = typename Float<dtype>::Bits;
  const bool wide = aligned(out, stride * sizeof(Bits));
  const cudaLaunchConfig_t config = launch_over<dtype>(w.rows, w.columns, wide, stream);
  return specialized(w.float32_scales, w.block, wide, [&](auto scale_dtype, auto constant_block, auto constant_wide) {
    constexpr Dtype kScale = decltype(scale_dtype)::value;
    constexpr auto kernel =
        dequantize_kernel<dtype, kScale, decltype(constant_block)::value, decltype(constant_wide)::value>;
    return (int)cudaLaunchKernelEx(&config, kernel, w.codes, (const typename Float<kScale>::Bits*)w.scales, w.rows,
                                   w.columns, (Bits*)out, stride);
  });
}

}  // namespace

int int4_quantize_cuda(const void* weight, Dtype dtype, int64_t rows, int64_t columns, int block, bool float32_scales,
                       bool mse, uint8_t* codes, void* scales, void* stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  if (mse) {
    return (dtype == kFloat32 ? fit<kFloat32> : fit<kBFloat16>)(weight, rows, columns, block, float32_scales, codes,
                                                                scales, stream);
  }
  if (columns % block == 0) columns *= rows, rows = 1;  // no block ends early, so that the rows are as one
  return (dtype == kFloat32 ? quantize<kFloat32> : quantize<kBFloat16>)(weight, rows, columns, block, float32_scales,
                                                                        codes, scales, stream);
}

int int4_dequantize_cuda(const Weight& weight, Dtype dtype, void* out, int64_t stride, void* stream) {
  Weight w = weight;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  if (w.columns % w.block == 0 && stride == w.columns) w.columns *= w.rows, stride = w.columns, w.rows = 1;
  return (dtype == kFloat32 ? dequantize<kFloat32> : dequantize<kBFloat16>)(w, out, stride, stream);
}

}  // namespace entrenar
