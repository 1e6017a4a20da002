// Optimizer steps of many tensors in one launch, after a small one that counts the steps and prepares their numbers, on
// the device, so that a step can be left out there and a graph of launches can be replayed.
#include "optim.h"

#include "batch.h"
#include "floats.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int kFloatElements = kThreads * kPack * 2;            // of a block, where states are floats
constexpr int kLaneCodes = kCodeBlock / kWarp;                  // of a lane, where they are codes: a warp for a code block
constexpr int kCodeRounds = 4;
constexpr int kCodeElements = kThreads / kWarp * kCodeBlock * kCodeRounds;

struct ScalarMath {
  static __host__ __device__ float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
  }
  static __host__ __device__ float sqrt(float value) { return sqrtf(value); }
  static __host__ __device__ float sign(float value) { return value > 0 ? 1.0f : value < 0 ? -1.0f : value; }
};

__device__ bool finite(float value) { return fabsf(value) <= 3.402823466e38f; }

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ Batch<OptimTensor> batch, const float* factor,
                   const __grid_constant__ OptimSettings settings, OptimStep* steps) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= batch.count || (factor && !finite(*factor))) return;
  const float step = *batch.tensors[i].step + 1;
  *batch.tensors[i].step = step;
  steps[i] = optim_step(settings, step);
}

template <Dtype dtype>
__device__ typename Float<dtype>::Bits narrowed(const OptimCall& call, const OptimStep& step, float value, float grad,
                                                int64_t index) {
  if constexpr (dtype == kBFloat16) {
    if (call.stochastic && value == value) {
      const uint32_t draw = optim_draw((uint32_t)index, step.key, int4::float_bits(grad));
      return (uint16_t)((int4::float_bits(value) + draw) >> 16);
    }
  }
  return Float<dtype>::narrow(value);
}

template <class T, int n>
__device__ bool aligned(const void* pointer) {
  return (uintptr_t)pointer % sizeof(Pack<T, n>) == 0;
}

template <Rule rule, Dtype dtype, Dtype state_dtype, int n>
__device__ void step_floats(const OptimCall& call, const OptimStep& step, float factor, const OptimTensor& tensor,
                            int64_t index) {
  using P = Pack<typename Float<dtype>::Bits, n>;
  using S = Pack<typename Float<state_dtype>::Bits, n>;
  auto& params = *(P*)((typename Float<dtype>::Bits*)tensor.param + index);
  auto* as = (S*)((typename Float<state_dtype>::Bits*)tensor.states[0] + index);
  auto* bs = (S*)((typename Float<state_dtype>::Bits*)tensor.states[1] + index);
  const P grad = *(const P*)((const typename Float<dtype>::Bits*)tensor.grad + index);
  P param = params;
  S a = {}, b = {};
  if (rule != kSGD || call.states) a = *as;
  if (rule == kAdam) b = *bs;
  for (int i = 0; i < n; i++) {
    float p = Float<dtype>::widen(param.at[i]), x = Float<state_dtype>::widen(a.at[i]);
    float y = Float<state_dtype>::widen(b.at[i]);
    const float g = Float<dtype>::widen(grad.at[i]);
    optim_update<rule, ScalarMath>(step, call.states, ScalarMath::mul(g, factor), p, x, y);
    param.at[i] = narrowed<dtype>(call, step, p, g, index + i);
    a.at[i] = Float<state_dtype>::narrow(x);
    b.at[i] = Float<state_dtype>::narrow(y);
  }
  params = param;
  if (rule != kSGD || call.states) *as = a;
  if (rule == kAdam) *bs = b;
}

template <Rule rule, Dtype dtype, Dtype state_dtype>
__global__ void __launch_bounds__(kThreads)
    floats_kernel(const __grid_constant__ Batch<OptimTensor> batch, const __grid_constant__ OptimCall call,
                  const OptimStep* steps) {
  const float clip = call.factor ? *call.factor : 1.0f;
  if (!finite(clip)) return;
  const int number = batch.find(blockIdx.x);
  const OptimTensor& tensor = batch.tensors[number];
  const OptimStep step = steps[number];
  const float factor = step.sign * clip;
  const int64_t begin = (blockIdx.x - batch.begin(number)) * kFloatElements;
  const int64_t end = min(tensor.size, begin + kFloatElements);
  using Bits = typename Float<dtype>::Bits;
  using StateBits = typename Float<state_dtype>::Bits;
  if (aligned<Bits, kPack>(tensor.param) && aligned<Bits, kPack>(tensor.grad) &&
      aligned<StateBits, kPack>(tensor.states[0]) && aligned<StateBits, kPack>(tensor.states[1])) {
    for (int64_t i = begin + threadIdx.x * kPack; i < end; i += kThreads * kPack) {
      if (i + kPack <= end) {
        step_floats<rule, dtype, state_dtype, kPack>(call, step, factor, tensor, i);
      } else {
        for (int64_t j = i; j < end; j++) step_floats<rule, dtype, state_dtype, 1>(call, step, factor, tensor, j);
      }
    }
  } else {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      step_floats<rule, dtype, state_dtype, 1>(call, step, factor, tensor, i);
    }
  }
}

// The `count` elements of a lane, which lie one after the other; what is missing becomes `rest`.
template <class T>
__device__ void load_lane(T (&to)[kLaneCodes], const T* from, int count, T rest) {
  if (count == kLaneCodes && aligned<T, kPack>(from)) {
    for (int i = 0; i < kLaneCodes; i += kPack) {
      const auto pack = *(const Pack<T, kPack>*)(from + i);
      for (int j = 0; j < kPack; j++) to[i + j] = pack.at[j];
    }
  } else {
    for (int i = 0; i < kLaneCodes; i++) to[i] = i < count ? from[i] : rest;
  }
}

template <class T>
__device__ void store_lane(T* to, const T (&from)[kLaneCodes], int count) {
  if (count == kLaneCodes && aligned<T, kPack>(to)) {
    for (int i = 0; i < kLaneCodes; i += kPack) {
      Pack<T, kPack> pack;
      for (int j = 0; j < kPack; j++) pack.at[j] = from[i + j];
      *(Pack<T, kPack>*)(to + i) = pack;
    }
  } else {
    for (int i = 0; i < kLaneCodes; i++) {
      if (i < count) to[i] = from[i];
    }
  }
}

// As `encode` in csrc/cpu/level/codes8bit.h.
template <bool with_sign>
__device__ uint8_t encode(const Codebook& book, float value) {
  const float size = fmaxf(fabsf(value), kLeastMagnitude);
  const int exponent = int4::float_bits(size) >> 23 & 31;
  const int region = book.regions[exponent] + (size >= book.edges[exponent]);
  int code = (int)(ScalarMath::mul(size, book.slopes[region]) + book.offsets[region]);
  code += size >= book.bounds[code];
  if (!with_sign) return (uint8_t)code;
  return (uint8_t)(int4::float_bits(value) >> 31 ? max(kZeroCode - code, 0) : kZeroCode + code);
}

template <bool with_sign>
__device__ void load_codes(const Codebook& book, float (&to)[kLaneCodes], const void* codes, int64_t index, int count,
                           float absmax) {
  uint8_t bytes[kLaneCodes];
  load_lane<uint8_t>(bytes, (const uint8_t*)codes + index, count, with_sign ? kZeroCode : 0);
  for (int i = 0; i < kLaneCodes; i++) to[i] = ScalarMath::mul(book.values[bytes[i]], absmax);
}

template <bool with_sign>
__device__ void store_codes(const Codebook& book, const float (&values)[kLaneCodes], void* codes, int64_t index,
                            int count, float* absmax) {
  float most = 0;
  for (int i = 0; i < kLaneCodes; i++) most = fmaxf(most, fabsf(values[i]));
  most = warp_max(most);
  if (most < kLeastAbsmax) most = 0;
  if (threadIdx.x % kWarp == 0) *absmax = most;
  const float inverse = most > 0 ? 1 / most : 0;
  uint8_t bytes[kLaneCodes];
  for (int i = 0; i < kLaneCodes; i++) bytes[i] = encode<with_sign>(book, ScalarMath::mul(values[i], inverse));
  store_lane((uint8_t*)codes + index, bytes, count);
}

template <Rule rule, Dtype dtype>
__global__ void __launch_bounds__(kThreads)
    codes_kernel(const __grid_constant__ Batch<OptimTensor> batch, const __grid_constant__ OptimCall call,
                 const OptimStep* steps) {
  const float clip = call.factor ? *call.factor : 1.0f;
  if (!finite(clip)) return;
  auto* shared = (uint32_t*)shared_memory();
  for (int k = 0; k < (rule == kAdam ? 2 : 1); k++) {
    for (int i = threadIdx.x; i < kCodebookSmallWords; i += kThreads) {
      shared[k * kCodebookSmallWords + i] = ((const uint32_t*)call.codebooks[k])[i];
    }
  }
  const auto& book = *(const Codebook*)shared;  // but for its buckets
  const auto& book2 = *(const Codebook*)(shared + kCodebookSmallWords);
  __syncthreads();

  using Bits = typename Float<dtype>::Bits;
  const int number = batch.find(blockIdx.x);
  const OptimTensor& tensor = batch.tensors[number];
  const OptimStep step = steps[number];
  const float factor = step.sign * clip;
  const int64_t begin = (blockIdx.x - batch.begin(number)) * kCodeElements;
  const int64_t end = min(tensor.size, begin + kCodeElements);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t block = begin + warp * kCodeBlock; block < end; block += kThreads / kWarp * kCodeBlock) {
    const int64_t index = block + lane * kLaneCodes, left = tensor.size - index;
    const int count = left < 0 ? 0 : left < kLaneCodes ? (int)left : kLaneCodes;
    float* const absmax = tensor.absmaxes[0] + block / kCodeBlock;
    float* const absmax2 = rule == kAdam ? tensor.absmaxes[1] + block / kCodeBlock : nullptr;
    Bits params[kLaneCodes], grads[kLaneCodes];
    float a[kLaneCodes], b[kLaneCodes] = {};
    load_lane<Bits>(params, (const Bits*)tensor.param + index, count, 0);
    load_lane<Bits>(grads, (const Bits*)tensor.grad + index, count, 0);
    load_codes<true>(book, a, tensor.states[0], index, count, *absmax);
    if (rule == kAdam) load_codes<false>(book2, b, tensor.states[1], index, count, *absmax2);
    __syncwarp();  // all lanes have read the maxima that one will write
    for (int i = 0; i < kLaneCodes; i++) {
      float p = Float<dtype>::widen(params[i]);
      const float g = Float<dtype>::widen(grads[i]);
      optim_update<rule, ScalarMath>(step, 1, ScalarMath::mul(g, factor), p, a[i], b[i]);
      params[i] = narrowed<dtype>(call, step, p, g, index + i);
    }
    store_lane((Bits*)tensor.param + index, params, count);
    store_codes<true>(book, a, tensor.states[0], index, count, absmax);
    if (rule == kAdam) store_codes<false>(book2, b, tensor.states[1], index, count, absmax2);
  }
}

template <class F>
auto with_rule(Rule rule, const F& f) {
  switch (rule) {
    case kSGD: return f(std::integral_constant<Rule, kSGD>());
    case kAdam: return f(std::integral_constant<Rule, kAdam>());
    default: return f(std::integral_constant<Rule, kLion>());
  }
}

}  // namespace

int optim_cuda(const OptimCall& call, const OptimSettings& settings, const OptimTensor* tensors, int64_t count,
               OptimStep* steps, void* stream) {
  const int64_t size = call.codes ? kCodeElements : kFloatElements;
  return in_batches(tensors, count, size, [&](const Batch<OptimTensor>& batch, int64_t first, int64_t blocks) {
    OptimStep* const numbers = steps + first;
    const cudaLaunchConfig_t few = launch_config((batch.count + kThreads - 1) / kThreads, kThreads, 0, stream);
    const int prepared = (int)cudaLaunchKernelEx(&few, prepare_kernel, batch, call.factor, settings, numbers);
    if (prepared != cudaSuccess || blocks == 0) return prepared;
    const size_t shared_bytes = call.codes ? kMaxStates * kCodebookSmallWords * sizeof(uint32_t) : 0;
    const cudaLaunchConfig_t config = launch_config(blocks, kThreads, shared_bytes, stream);
    return with_rule(call.rule, [&](auto r) {
      return with_dtype(call.dtype, [&](auto d) {
        constexpr Rule rule = decltype(r)::value;
        constexpr Dtype dtype = decltype(d)::value;
        const OptimStep* const read = numbers;
        if (call.codes) return (int)cudaLaunchKernelEx(&config, codes_kernel<rule, dtype>, batch, call, read);
        if (call.state_dtype == dtype) {
          return (int)cudaLaunchKernelEx(&config, floats_kernel<rule, dtype, dtype>, batch, call, read);
        }
        return (int)cudaLaunchKernelEx(&config, floats_kernel<rule, dtype, kFloat32>, batch, call, read);
      });
    });
  });
}

}  // namespace entrenar
