// Cross-entropy of rows of logits with one right class each, and its gradient softmax(logits) - onehot(target): a block
// for each row, which reads it once for the largest logit and the sum of exponentials. For the gradient it keeps what it
// has read in shared memory, as far as that reaches.
#undef NDEBUG  // a target that is no class is asserted against in every build, as torch does on CUDA
#include <assert.h>

#include "cross_entropy.h"
#include "functions.h"
#include "launch.h"
#include "rows.h"

namespace entrenar {

namespace {

// One number with and without the gradient: the losses have the same bits. On an H200, rows of 32000, 256 take 9 % less
// time for the losses and 9 % more for the gradient.
constexpr int kThreads = 512;
constexpr int kBlocks = 3;  // of kThreads, on a multiprocessor: so each thread may have 42 registers
constexpr int kLoads = 4;   // of a thread, in flight together

// Σ e^(x - highest) over logits x seen so far, of which `highest` is the largest; -infinity before the first.
template <Dtype dtype>
struct SumOfExponentials {
  float highest = -INFINITY, sum = 0.0f;

  // What is subtracted from logits: of -infinity alone nothing can be.
  static __device__ float shift_of(float highest) { return highest == -INFINITY ? 0.0f : highest; }

  template <int n>
  __device__ void add(const Pack<float, n>& logits) {
    float largest = highest;
    for (int e = 0; e < n; e++) largest = fmaxf(largest, logits.at[e]);
    const float shift = shift_of(largest);
    float part = 0.0f;
    for (int e = 0; e < n; e++) part += exponential<dtype>(logits.at[e] - shift);
    sum = sum * exponential<dtype>(highest - shift) + part;
    highest = largest;
  }

  // That of the whole block, in every thread; `shared` holds two floats for each warp.
  __device__ void over_block(float* shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    over_warp();
    if (lane == 0) {
      shared[warp] = highest;
      shared[kWarp + warp] = sum;
    }
    __syncthreads();
    highest = lane < warps ? shared[lane] : -INFINITY;
    sum = lane < warps ? shared[kWarp + lane] : 0.0f;
    over_warp();
  }

 private:
  __device__ void over_warp() {
    const float largest = warp_max(highest);
    sum = warp_sum(sum * expf(highest - shift_of(largest)));
    highest = largest;
  }
};

// A row as packs that begin at multiples of 16 bytes, and at most `pack - 1` single elements before and after them.
struct Split {
  int64_t head, packs, columns;
  int pack;

  __device__ int64_t singles() const { return columns - packs * pack; }
  __device__ int64_t single(int64_t s) const { return s < head ? s : packs * pack + s; }
};

template <Dtype dtype, int n>
__device__ Split split_of(const typename Float<dtype>::Bits* row, int64_t columns) {
  const int64_t before = n == 1 ? 0 : (int64_t)(-(uintptr_t)row % 16) / (int64_t)sizeof *row;
  const int64_t head = min(before, columns);
  return {head, (columns - head) / n, columns, n};
}

constexpr size_t kSumBytes = 2 * kWarp * sizeof(float);  // at the start of shared memory

template <Dtype dtype, int n>
__global__ void __launch_bounds__(kThreads, kBlocks) cross_entropy_kernel(CrossEntropy p, int64_t packs_kept) {
  using Bits = typename Float<dtype>::Bits;
  const int64_t row = blockIdx.x, target = p.targets[row];
  const auto* logits = (const Bits*)p.logits + row * p.classes;
  auto* gradient = p.gradient ? (Bits*)p.gradient + row * p.classes : nullptr;
  const Split split = split_of<dtype, n>(logits, p.classes);
  Waiting<Bits, n> packs[kLoads];
  const auto read = [&](int64_t first) {
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int64_t i = first + l * blockDim.x;
      if (i < split.packs) packs[l] = load_waiting<n>(logits + split.head + i * n);
    }
  };
  read(threadIdx.x);  // on its way while the target is waited for
  if (target == p.ignore_index) {
    if (gradient) {
      const Pack<Bits, n> zeros = {};
      for (int64_t i = threadIdx.x; i < split.packs; i += blockDim.x) store(gradient + split.head + i * n, zeros);
      for (int64_t s = threadIdx.x; s < split.singles(); s += blockDim.x) gradient[split.single(s)] = Bits();
    }
    if (p.losses && threadIdx.x == 0) p.losses[row] = 0.0f;
    return;
  }
  assert(target >= 0 && target < p.classes);
  const float target_logit = Float<dtype>::widen(logits[target]);

  auto* kept = (Waiting<Bits, n>*)(shared_memory() + kSumBytes);
  SumOfExponentials<dtype> sum;
  for (int64_t first = threadIdx.x; first < split.packs; first += kLoads * blockDim.x) {
    if (first > threadIdx.x) read(first);
#pragma unroll
    for (int l = 0; l < kLoads; l++) {
      const int64_t i = first + l * blockDim.x;
      if (i >= split.packs) break;
      if (i < packs_kept) kept[i] = packs[l];
      sum.add(widened<dtype>(pack_of<Bits, n>(packs[l])));
    }
  }
  for (int64_t s = threadIdx.x; s < split.singles(); s += blockDim.x) {
    sum.add(widened<dtype>(load<1>(logits + split.single(s))));
  }
  const float scale = p.scales ? p.scales[row] : 1.0f;  // on its way while the block adds up
  sum.over_block((float*)shared_memory());
  const float highest = sum.highest, at_target = target_logit - highest;
  if (p.losses && threadIdx.x == 0) p.losses[row] = logf(sum.sum) - at_target;
  if (!gradient) return;

  const float factor = scale / sum.sum;
  for (int64_t i = threadIdx.x; i < split.packs; i += blockDim.x) {
    const auto bits = i < packs_kept ? kept[i] : load_waiting<n>(logits + split.head + i * n);
    Pack<float, n> values = widened<dtype>(pack_of<Bits, n>(bits));
    for (float& value : values.at) value = exponential<dtype>(value - highest) * factor;
    store(gradient + split.head + i * n, narrowed<dtype>(values));
  }
  for (int64_t s = threadIdx.x; s < split.singles(); s += blockDim.x) {
    const int64_t i = split.single(s);
    gradient[i] = Float<dtype>::narrow(exponential<dtype>(Float<dtype>::widen(logits[i]) - highest) * factor);
  }
  __syncthreads();  // the target's element is written last
  if (threadIdx.x == 0) gradient[target] = Float<dtype>::narrow(scale * (expf(at_target) / sum.sum - 1.0f));
}

template <Dtype dtype, int n>
int launch_rows(const CrossEntropy& p, void* stream) {
  using Kept = Pack<typename Float<dtype>::Bits, n>;
  const Device& device = current_device();
  int64_t packs = 0;
  if (p.gradient) packs = std::min((device.shared_bytes - (int64_t)kSumBytes) / (int64_t)sizeof(Kept), p.classes / n);
  const int64_t threads = std::min<int64_t>(kThreads, (p.classes / n + kWarp) / kWarp * kWarp);
  const Launch how = {dim3((unsigned)p.rows), (unsigned)threads, (int64_t)(kSumBytes + packs * sizeof(Kept)), stream};
  return launch<cross_entropy_kernel<dtype, n>>(device, how, p, packs);
}

}  // namespace

int cross_entropy_cuda(const CrossEntropy& p, void* stream) {
  if (p.rows == 0) return cudaSuccess;
  // The gradient's rows must begin as many bytes past a multiple of 16 as those of the logits.
  const bool packs = !p.gradient || ((uintptr_t)p.logits - (uintptr_t)p.gradient) % 16 == 0;
  if (p.dtype == kFloat32) return packs ? launch_rows<kFloat32, 4>(p, stream) : launch_rows<kFloat32, 1>(p, stream);
  return packs ? launch_rows<kBFloat16, 8>(p, stream) : launch_rows<kBFloat16, 1>(p, stream);
}

}  // namespace entrenar
