// Optimizer steps of many tensors in one launch, after a small one that counts the steps and prepares their numbers, on
// the device, so that a step can be left out there and a graph of launches can be replayed.
#include "optim.h"

#include "async.h"
#include "batch.h"
#include "dependent.h"
#include "floats.h"
#include "functions.h"
#include "launch.h"

namespace entrenar {

namespace {

constexpr int kThreads = 256;
constexpr int kPack = 4;
constexpr int kFloatElements = kThreads * kPack * 2;          // of a block, where states are floats
constexpr int kCodeElements = kThreads / kWarp * kCodeBlock;  // of a tile, where they are codes: a code block a warp
constexpr int kResident = 3;                                  // blocks of threads on a multiprocessor

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
  let_next_kernel_begin();
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

// The magnitudes of codes lie above this, 2^-23, or are zero.
constexpr float kLeastSize = 1.1920928955078125e-07f;
constexpr uint32_t kFirstBucket = 0x3400;  // the upper half of its bits
constexpr int kBuckets = 0x4000 - kFirstBucket;

// A codebook in shared memory. An addend, found by the upper half of a magnitude's bits, makes the third byte of its sum
// with them the code: one word read for a code, where the regions would take five.
struct CodeTable {
  float values[kCodes];
  uint32_t addends[kBuckets];
};

__device__ void fill_table(CodeTable& table, const Codebook& book) {
  static_assert(kCodes % kThreads == 0 && kBuckets % kThreads == 0, "no thread is left over");
#pragma unroll
  for (int i = 0; i < kCodes; i += kThreads) table.values[i + threadIdx.x] = book.values[i + threadIdx.x];
#pragma unroll
  for (int i = 0; i < kBuckets; i += kThreads) {
    const int j = i + threadIdx.x;
    const uint32_t bucket = book.buckets[(1 << 12) - kBuckets + j];
    const uint32_t code = bucket >> kThresholdBits, threshold = bucket & ((1 << kThresholdBits) - 1);
    table.addends[j] = ((code + 1 - (kFirstBucket + j)) << 16) - threshold;
  }
}

// Four values of a word of codes.
__device__ void decode(const CodeTable& table, uint32_t codes, float absmax, float* to) {
#pragma unroll
  for (int i = 0; i < kPack; i++) to[i] = ScalarMath::mul(table.values[codes >> 8 * i & 0xff], absmax);
}

// The upper (or third) bytes of four words.
template <int byte>
__device__ uint32_t bytes_of(const uint32_t* words) {
  constexpr unsigned kTwo = byte | (byte + 4) << 4;
  return __byte_perm(__byte_perm(words[0], words[1], kTwo), __byte_perm(words[2], words[3], kTwo), 0x5410);
}

// Four codes of values between -1 and 1, or hardly beyond; NaN becomes zero.
template <bool with_sign>
__device__ uint32_t encode(const CodeTable& table, const float* values) {
  uint32_t sums[kPack], bits[kPack];
#pragma unroll
  for (int i = 0; i < kPack; i++) {
    bits[i] = int4::float_bits(values[i]);
    const uint32_t size = int4::float_bits(fmaxf(fabsf(values[i]), kLeastSize));
    sums[i] = table.addends[(size >> 16) - kFirstBucket] + size;
  }
  const uint32_t codes = bytes_of<2>(sums);
  if (!with_sign) return codes;
  // Byte by byte: 127 + code, or 127 - code, which is 127 ^ code but for 128, whose result is 0.
  static_assert(kZeroCode == 0x7f, "of 7 bits");
  const uint32_t negative = bytes_of<3>(bits) >> 7 & 0x01010101;
  const uint32_t flip = negative * kZeroCode, beyond = codes >> 7 & negative;
  return (codes ^ flip) - beyond * 0xff - flip + kZeroCode * 0x01010101;
}

// As about_reciprocal, of numbers far from the ends of the range.
__device__ float about_reciprocal_root(float value) {
#if defined(ENTRENAR_EMULATED)
  return 1 / sqrtf(value);
#else
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

__device__ float rounded_reciprocal(float value) {
  const float about = about_reciprocal(value);
  return fmaf(about, fmaf(-value, about, 1.0f), about);
}

// a / b, rounded once, given b's reciprocal.
__device__ float quotient(float a, float b, float reciprocal) {
  const float about = ScalarMath::mul(a, reciprocal);
  return fmaf(reciprocal, fmaf(-b, about, a), about);
}

// As sqrtf. 2^-126 keeps the root of zero finite, and adds nothing to numbers from kLeastRadicand on.
__device__ float root(float value) {
  const float inverse = about_reciprocal_root(value + 0x1p-126f), about = ScalarMath::mul(value, inverse);
  return fmaf(fmaf(-about, about, value), ScalarMath::mul(inverse, 0.5f), about);
}

// Within which bounds Adam's roots and quotients need no care for the ends of the range, so that they are computed as
// the compiler's own code does, but without its branches, around which it moves nothing.
constexpr float kLeastRadicand = 0x1p-101f, kLeastDividend = 0x1p-100f;
struct AdamBounds {
  float over_root = 0;           // the reciprocal of OptimStep::root
  float most_a = 0, most_b = 0;  // of the states

  AdamBounds() = default;
  __device__ explicit AdamBounds(const OptimStep& step) {
    over_root = rounded_reciprocal(step.root);
    most_a = step.eps >= 0x1p-60f && step.eps <= 0x1p18f ? 0x1p60f / fmaxf(step.rate, 0x1p-60f) : -1;
    most_b = 0x1p36f * step.root * step.root;
  }
};

// optim_update of kPack elements of states in 8 bits, to the bit.
template <Rule rule>
__device__ void update_pack(const OptimStep& step, const AdamBounds& bounds, float* grads, float* params, float* a,
                            float* b, float& most_a, float& most_b) {
  if constexpr (rule == kAdam) {
#pragma unroll
    for (int i = 0; i < kPack; i++) params[i] = ScalarMath::mul(params[i], step.decay);
    if (step.l2 != 0) {
#pragma unroll
      for (int i = 0; i < kPack; i++) grads[i] = grads[i] + ScalarMath::mul(params[i], step.l2);
    }
    float dividends[kPack], now_a = 0, now_b = 0;
    uint32_t least_dividend = ~0u, least_radicand = ~0u;  // of those that are not zero: 0 - 1 is the largest
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      const float grad = grads[i];
      a[i] = a[i] + ScalarMath::mul(grad - a[i], step.gain1);
      b[i] = ScalarMath::mul(b[i], step.keep2) + ScalarMath::mul(ScalarMath::mul(grad, step.gain2), grad);
      dividends[i] = ScalarMath::mul(a[i], step.rate);
      now_a = fmaxf(now_a, fabsf(a[i]));
      now_b = fmaxf(now_b, fabsf(b[i]));
      least_dividend = min(least_dividend, 2 * int4::float_bits(dividends[i]) - 1);
      least_radicand = min(least_radicand, int4::float_bits(b[i]) - 1);
    }
    if (least_dividend >= 2 * int4::float_bits(kLeastDividend) - 1 &&
        least_radicand >= int4::float_bits(kLeastRadicand) - 1 && now_a <= bounds.most_a && now_b <= bounds.most_b) {
#pragma unroll
      for (int i = 0; i < kPack; i++) {
        const float divisor = quotient(root(b[i]), step.root, bounds.over_root) + step.eps;
        const float change = quotient(dividends[i], divisor, rounded_reciprocal(divisor));
        // A zero has its sign from the dividend.
        const uint32_t sign = int4::float_bits(dividends[i]) & 0x80000000;
        params[i] = params[i] - int4::bits_float(int4::float_bits(change) | sign);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPack; i++) {  // the arrays turn, so that they stay in registers
        const float param = params[0] - dividends[0] / (sqrtf(b[0]) / step.root + step.eps);
        const float dividend = dividends[0], radicand = b[0];
#pragma unroll
        for (int j = 0; j + 1 < kPack; j++) {
          params[j] = params[j + 1];
          dividends[j] = dividends[j + 1];
          b[j] = b[j + 1];
        }
        params[kPack - 1] = param;
        dividends[kPack - 1] = dividend;
        b[kPack - 1] = radicand;
      }
    }
    most_a = fmaxf(most_a, now_a);
    most_b = fmaxf(most_b, now_b);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      optim_update<rule, ScalarMath>(step, 1, grads[i], params[i], a[i], b[i]);
      most_a = fmaxf(most_a, fabsf(a[i]));
    }
  }
}

// A code block, on its way through shared memory.
template <Rule rule, Dtype dtype>
struct alignas(16) Stage {
  static constexpr int kStates = rule == kAdam ? 2 : 1;
  typename Float<dtype>::Bits params[kCodeBlock], grads[kCodeBlock];
  uint8_t codes[kStates][kCodeBlock];
  float absmaxes[4];  // of the states
};

// Where a block of threads is among the tensors' tiles, of a code block for each warp.
template <int states>
class Cursor {
 public:
  __device__ explicit Cursor(const Batch<OptimTensor>& batch, int tile) : batch_(batch), number_(batch.find(tile)) {
    enter();
  }

  __device__ void seek(int tile) {
    if (tile < end_) return;
    number_ = batch_.find(tile, number_ + 1);
    enter();
  }

  __device__ int number() const { return number_; }
  __device__ const OptimTensor& tensor() const { return batch_.tensors[number_]; }

  // Of the tensor's code blocks, that of this warp.
  __device__ uint32_t block(int tile) const {
    return (tile - begin_) * (kThreads / kWarp) + threadIdx.x / kWarp;
  }
  __device__ bool has(uint32_t block) const { return block < blocks_; }
  // Whether its elements are moved 16 bytes at a time.
  __device__ bool whole(uint32_t block) const { return block < whole_; }

 private:
  __device__ void enter() {
    begin_ = (int)batch_.begin(number_);
    end_ = batch_.end[number_];
    const OptimTensor& t = tensor();
    uintptr_t addresses = (uintptr_t)t.param | (uintptr_t)t.grad | (uintptr_t)t.states[0];
    if (states == 2) addresses |= (uintptr_t)t.states[1];
    blocks_ = (uint32_t)code_blocks(t.size);
    whole_ = addresses % 16 ? 0 : (uint32_t)(t.size / kCodeBlock);
  }

  const Batch<OptimTensor>& batch_;
  int number_, begin_, end_;
  uint32_t blocks_, whole_;
};

template <Rule rule, Dtype dtype>
__device__ void fetch(Stage<rule, dtype>& stage, const OptimTensor& tensor, uint32_t block, bool whole) {
  using S = Stage<rule, dtype>;
  using Bits = typename Float<dtype>::Bits;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = (int64_t)block * kCodeBlock;
  const auto* params = (const Bits*)tensor.param + begin;
  const auto* grads = (const Bits*)tensor.grad + begin;
  if (whole) {
    constexpr int kCopy = 16 / sizeof(Bits);
#pragma unroll
    for (int i = 0; i < kCodeBlock; i += kWarp * kCopy) {
      copy_async<16>(stage.params + i + lane * kCopy, params + i + lane * kCopy);
      copy_async<16>(stage.grads + i + lane * kCopy, grads + i + lane * kCopy);
    }
    constexpr int kCopies = kCodeBlock / 16;
    if (lane < S::kStates * kCopies) {
      const auto* codes = (const uint8_t*)(lane < kCopies ? tensor.states[0] : tensor.states[1]) + begin;
      copy_async<16>(stage.codes[0] + lane * 16, codes + lane % kCopies * 16);
    }
  } else {
    const int count = (int)min((int64_t)kCodeBlock, tensor.size - begin);
#pragma unroll 1
    for (int i = lane; i < kCodeBlock; i += kWarp) {
      stage.params[i] = i < count ? params[i] : Bits(0);
      stage.grads[i] = i < count ? grads[i] : Bits(0);
      for (int k = 0; k < S::kStates; k++) {
        stage.codes[k][i] = i < count ? ((const uint8_t*)tensor.states[k])[begin + i] : k ? 0 : kZeroCode;
      }
    }
  }
  if (lane < S::kStates) copy_async<4>(stage.absmaxes + lane, tensor.absmaxes[lane] + block);
}

template <bool with_sign>
__device__ void store_codes(const CodeTable& table, const float (&values)[2 * kPack], float most, uint32_t* codes,
                            float* absmax) {
  const int lane = threadIdx.x % kWarp;
  most = int4::bits_float(__reduce_max_sync(kAllLanes, int4::float_bits(most)));
  if (most < kLeastAbsmax) most = 0;
  if (lane == 0) *absmax = most;
  const float inverse = most > 0 ? 1 / most : 0;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    float scaled[kPack];
#pragma unroll
    for (int i = 0; i < kPack; i++) scaled[i] = ScalarMath::mul(values[k * kPack + i], inverse);
    codes[k * kWarp + lane] = encode<with_sign>(table, scaled);
  }
}

// The step of a staged code block. Results go to the tensor itself where it is `whole`.
template <Rule rule, Dtype dtype, bool whole>
__device__ void take(const OptimCall& call, const OptimStep& step, const AdamBounds& bounds, float factor,
                     const CodeTable* tables, Stage<rule, dtype>& stage, const OptimTensor& tensor, uint32_t block) {
  using S = Stage<rule, dtype>;
  using Bits = typename Float<dtype>::Bits;
  using P = Pack<Bits, kPack>;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = (int64_t)block * kCodeBlock;
  P* const params = (P*)(whole ? (Bits*)tensor.param + begin : stage.params);
  float a[2 * kPack], b[2 * kPack] = {}, most_a = 0, most_b = 0;
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int at = k * kWarp + lane;
    const P param = ((const P*)stage.params)[at], grad = ((const P*)stage.grads)[at];
    float p[kPack], g[kPack];
    decode(tables[0], ((const uint32_t*)stage.codes[0])[at], stage.absmaxes[0], a + k * kPack);
    if (rule == kAdam) {
      decode(tables[1], ((const uint32_t*)stage.codes[S::kStates - 1])[at], stage.absmaxes[1], b + k * kPack);
    }
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      p[i] = Float<dtype>::widen(param.at[i]);
      g[i] = ScalarMath::mul(Float<dtype>::widen(grad.at[i]), factor);
    }
    update_pack<rule>(step, bounds, g, p, a + k * kPack, b + k * kPack, most_a, most_b);
    P result;
#pragma unroll
    for (int i = 0; i < kPack; i++) {
      result.at[i] = narrowed<dtype>(call, step, p[i], Float<dtype>::widen(grad.at[i]), begin + at * kPack + i);
    }
    params[at] = result;
  }
  const auto codes = [&](int state) {
    return (uint32_t*)(whole ? (uint8_t*)tensor.states[state] + begin : stage.codes[state]);
  };
  store_codes<true>(tables[0], a, most_a, codes(0), tensor.absmaxes[0] + block);
  if (rule == kAdam) {
    store_codes<false>(tables[1], b, most_b, codes(S::kStates - 1), tensor.absmaxes[S::kStates - 1] + block);
  }
  if (!whole) {
    __syncwarp();
    const int count = (int)min((int64_t)kCodeBlock, tensor.size - begin);
#pragma unroll 1
    for (int i = lane; i < count; i += kWarp) {
      ((Bits*)tensor.param)[begin + i] = stage.params[i];
      for (int k = 0; k < S::kStates; k++) ((uint8_t*)tensor.states[k])[begin + i] = stage.codes[k][i];
    }
  }
}

template <Rule rule, Dtype dtype>
struct CodesMemory {
  CodeTable tables[Stage<rule, dtype>::kStates];
  Stage<rule, dtype> stages[kThreads / kWarp][2];  // one is taken while the next is on its way
};

template <Rule rule, Dtype dtype>
__global__ void __launch_bounds__(kThreads, kResident)
    codes_kernel(const __grid_constant__ Batch<OptimTensor> batch, const __grid_constant__ OptimCall call,
                 const OptimStep* steps) {
  constexpr int kStates = Stage<rule, dtype>::kStates;
  const float clip = call.factor ? *call.factor : 1.0f;
  if (!finite(clip)) {
    wait_for_kernel_before();
    return;
  }
  auto& memory = *(CodesMemory<rule, dtype>*)shared_memory();
  Stage<rule, dtype>* const stages = memory.stages[threadIdx.x / kWarp];
  const int tiles = batch.end[batch.count - 1];
  // Blocks take turns, so that memory is walked through in its order: shares of neighbours take 10% longer on an H200.
  int tile = blockIdx.x;
  Cursor<kStates> ahead(batch, tile);
  const auto fetch_tile = [&](int tile, Stage<rule, dtype>& stage) {
    if (tile < tiles) {
      ahead.seek(tile);
      const uint32_t block = ahead.block(tile);
      if (ahead.has(block)) fetch(stage, ahead.tensor(), block, ahead.whole(block));
    }
    group_copies();
  };
  fetch_tile(tile, stages[0]);
  for (int k = 0; k < kStates; k++) fill_table(memory.tables[k], *call.codebooks[k]);
  __syncthreads();

  wait_for_kernel_before();  // prepare_kernel alone: those before it have ended when that begins
  int of = -1;  // the tensor of
  OptimStep step = {};
  AdamBounds bounds;
  float factor = 0;
  for (int turn = 0; tile < tiles; tile += gridDim.x, turn ^= 1) {
    const Cursor<kStates> here = ahead;
    if (here.number() != of) {
      of = here.number();
      step = steps[of];
      factor = step.sign * clip;
      if (rule == kAdam) bounds = AdamBounds(step);
    }
    wait_for_groups<0>();
    __syncwarp();
    fetch_tile(tile + gridDim.x, stages[turn ^ 1]);
    const uint32_t block = here.block(tile);
    if (here.whole(block)) {
      take<rule, dtype, true>(call, step, bounds, factor, memory.tables, stages[turn], here.tensor(), block);
    } else if (here.has(block)) {
      take<rule, dtype, false>(call, step, bounds, factor, memory.tables, stages[turn], here.tensor(), block);
    }
  }
}

template <Rule rule, Dtype dtype>
int launch_codes(const Batch<OptimTensor>& batch, const OptimCall& call, const OptimStep* steps, int64_t tiles,
                 void* stream) {
  const Device& device = current_device();
  const unsigned blocks = (unsigned)std::min<int64_t>(tiles, device.processors * kResident);
  const Launch how = {dim3(blocks), kThreads, sizeof(CodesMemory<rule, dtype>), stream, 1, true};
  return launch<codes_kernel<rule, dtype>>(device, how, batch, call, steps);
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
    const cudaLaunchConfig_t config = launch_config(blocks, kThreads, 0, stream);
    return with_rule(call.rule, [&](auto r) {
      return with_dtype(call.dtype, [&](auto d) {
        constexpr Rule rule = decltype(r)::value;
        constexpr Dtype dtype = decltype(d)::value;
        const OptimStep* const read = numbers;
        if (call.codes) return launch_codes<rule, dtype>(batch, call, read, blocks, stream);
        if (call.state_dtype == dtype) {
          return (int)cudaLaunchKernelEx(&config, floats_kernel<rule, dtype, dtype>, batch, call, read);
        }
        return (int)cudaLaunchKernelEx(&config, floats_kernel<rule, dtype, kFloat32>, batch, call, read);
      });
    });
  });
}

}  // namespace entrenar
