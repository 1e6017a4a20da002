// Rows of a matrix, each worked on by a team of threads: a block, or for short rows a warp. A row stays in the team's
// registers between a sum over it and its use, or is read anew where it is longer than they hold.
#pragma once

#include "floats.h"

namespace entrenar {

constexpr int kMaxTeam = 512;     // threads: so each may have 128 registers
constexpr int kTeamsInBlock = 4;  // where a team is a warp

// The elements that one load of 16 bytes brings.
template <Dtype dtype>
constexpr int kWide = 16 / sizeof(typename Float<dtype>::Bits);

template <Dtype dtype, int n>
static __device__ inline Pack<float, n> widened(const Pack<typename Float<dtype>::Bits, n>& bits) {
  Pack<float, n> values;
  if constexpr (dtype == kBFloat16 && n % 2 == 0) {  // in place, in either half of a word
    uint32_t words[n / 2];
    memcpy(words, &bits, sizeof bits);
    for (int i = 0; i < n; i++) {
      values.at[i] = int4::bits_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    }
  } else {
    for (int i = 0; i < n; i++) values.at[i] = Float<dtype>::widen(bits.at[i]);
  }
  return values;
}

template <Dtype dtype, int n>
static __device__ inline Pack<typename Float<dtype>::Bits, n> narrowed(const Pack<float, n>& values) {
  Pack<typename Float<dtype>::Bits, n> bits;
  for (int i = 0; i < n; i++) bits.at[i] = Float<dtype>::narrow(values.at[i]);
  return bits;
}

template <int n, class T>
static __device__ inline Pack<T, n> load(const T* from) {
  return *(const Pack<T, n>*)from;
}

// A pack that waits in registers, as words where it has them: elements of 16 bits the compiler takes apart where they
// are loaded on a condition or for the next turn of a loop, and so waits for each load at once.
template <class T, int n>
using Waiting = std::conditional_t<sizeof(T) * n == 16, uint4, Pack<T, n>>;

template <int n, class T>
static __device__ inline Waiting<T, n> load_waiting(const T* from) {
  return *(const Waiting<T, n>*)from;
}

template <class T, int n>
static __device__ inline Pack<T, n> pack_of(Waiting<T, n> waiting) {
#if defined(__CUDA_ARCH__)  // converted for each use: kept for the next, float32 would take twice the registers
  if constexpr (sizeof(T) * n == 16) {
    asm volatile("" : "+r"(waiting.x), "+r"(waiting.y), "+r"(waiting.z), "+r"(waiting.w));
  }
#endif
  Pack<T, n> pack;
  memcpy(&pack, &waiting, sizeof pack);
  return pack;
}

// To global memory.
template <int n, class T>
static __device__ inline void store(T* to, const Pack<T, n>& pack) {
#if defined(__CUDA_ARCH__)  // by one instruction, into which the compiler does not join all stores of elements
  if constexpr (sizeof pack == 16) {
    uint4 words;
    memcpy(&words, &pack, sizeof words);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
    return;
  }
#endif
  *(Pack<T, n>*)to = pack;
}

// f(p, i) for the packs of a row that are this thread's: pack p begins at element i. At most `held`, or any number if 0.
template <int n, int held, class F>
static __device__ inline void for_packs(int64_t columns, const F& f) {
  if constexpr (held > 0) {
#pragma unroll
    for (int p = 0; p < held; p++) {
      const int64_t i = (int64_t)(p * blockDim.x + threadIdx.x) * n;
      if (i < columns) f(p, i);
    }
  } else {
    for (int64_t i = (int64_t)threadIdx.x * n; i < columns; i += (int64_t)blockDim.x * n) f(0, i);
  }
}

// This thread's part of a row.
template <Dtype dtype, int n, int held>
class RowPart {
 public:
  using Bits = typename Float<dtype>::Bits;

  __device__ RowPart(const void* matrix, int64_t row, int64_t columns) : from_((const Bits*)matrix + row * columns) {
    if constexpr (held > 0) {
      for_packs<n, held>(columns, [&](int p, int64_t i) { packs_[p] = load_waiting<n>(from_ + i); });
    }
  }

  __device__ Pack<float, n> at(int p, int64_t i) const {
    if constexpr (held > 0) {
      return widened<dtype>(pack_of<Bits, n>(packs_[p]));
    } else {
      return widened<dtype>(load<n>(from_ + i));
    }
  }

  // The row becomes that which `to` is written with, pack by pack.
  __device__ void put(Bits* to, int p, int64_t i, const Pack<float, n>& values) {
    const Pack<Bits, n> pack = narrowed<dtype>(values);
    memcpy(&packs_[p], &pack, sizeof pack);
    store(to + i, pack);
  }
  __device__ void read_from(const Bits* from) { from_ = from; }

 private:
  const Bits* from_;
  Waiting<Bits, n> packs_[held > 0 ? held : 1];
};

// This thread's part of the weights of the columns, all 1 where there are none.
template <Dtype dtype, int n, int held>
class Weights {
 public:
  using Bits = typename Float<dtype>::Bits;

  __device__ Weights(const void* weight, int64_t columns) : from_((const Bits*)weight) {
    if constexpr (held > 0) {
      for_packs<n, held>(columns, [&](int p, int64_t i) {
        if (from_) packs_[p] = load_waiting<n>(from_ + i);
      });
    }
  }

  __device__ Pack<float, n> at(int p, int64_t i) const {
    Pack<float, n> values;
    for (float& value : values.at) value = 1.0f;
    if (from_) values = widened<dtype>(held > 0 ? pack_of<Bits, n>(packs_[p]) : load<n>(from_ + i));
    return values;
  }

 private:
  const Bits* from_;
  Waiting<Bits, n> packs_[held > 0 ? held : 1];
};

constexpr int kTeamSums = 3;  // at once, at most

// The sums over a team, in every thread, in an order that the size of the team alone decides. `turn` counts the sums
// that the team has taken: every other is exchanged at another place, so that those before have been read.
template <int count>
static __device__ inline void team_sum(float (&sums)[count], int turn) {
  static_assert(count <= kTeamSums, "");
  for (int s = 0; s < count; s++) sums[s] = warp_sum(sums[s]);
  if (blockDim.x == kWarp) return;
  auto* shared = (float*)shared_memory() + turn % 2 * kTeamSums * kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  if (lane == 0) {
    for (int s = 0; s < count; s++) shared[s * kWarp + warp] = sums[s];
  }
  __syncthreads();
  for (int s = 0; s < count; s++) sums[s] = warp_sum(lane < warps ? shared[s * kWarp + lane] : 0.0f);
}
constexpr size_t kTeamSumBytes = 2 * kTeamSums * kWarp * sizeof(float);  // of shared memory

static __device__ inline int64_t team() { return (int64_t)blockIdx.x * blockDim.y + threadIdx.y; }

// How rows are divided: into packs of `pack` elements, among `threads` of which each holds up to `kHeld` packs, or none
// where `held` is false.
struct Teams {
  int pack, threads;
  bool held;
};

// `aligned`: every row begins at a multiple of 16 bytes.
template <Dtype dtype, int kHeld>
Teams teams_for(int64_t columns, bool aligned) {
  Teams t = {};
  t.pack = aligned ? kWide<dtype> : 1;
  const int64_t threads = (columns + t.pack * kHeld - 1) / (t.pack * kHeld);
  t.held = threads <= kMaxTeam;
  t.threads = t.held ? (int)(threads + kWarp - 1) / kWarp * kWarp : kMaxTeam;
  return t;
}

inline bool aligned_to_16(const void* pointer) { return (uintptr_t)pointer % 16 == 0; }

// For `count` teams.
inline cudaLaunchConfig_t launch_teams(const Teams& t, int64_t count, void* stream) {
  cudaLaunchConfig_t config = {};
  const int in_block = t.threads == kWarp ? kTeamsInBlock : 1;
  config.gridDim = dim3((unsigned)((count + in_block - 1) / in_block));
  config.blockDim = dim3(t.threads, in_block);
  config.dynamicSmemBytes = kTeamSumBytes;
  config.stream = (cudaStream_t)stream;
  return config;
}

// f(pack, held) with integral constants, for what `t` says.
template <Dtype dtype, int kHeld, class F>
auto with_teams(const Teams& t, const F& f) {
  constexpr std::integral_constant<int, kWide<dtype>> wide;
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, kHeld> held;
  constexpr std::integral_constant<int, 0> unheld;
  if (t.pack == 1) return t.held ? f(one, held) : f(one, unheld);
  return t.held ? f(wide, held) : f(wide, unheld);
}

}  // namespace entrenar
