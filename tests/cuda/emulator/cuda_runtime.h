// CUDA's run-time interface, as far as the kernels use it, on the CPU: a fiber for each thread of a block, switched at
// shuffles and barriers. With ENTRENAR_EMULATOR_ORDER=reversed the threads run in the other order, which shows a missing
// barrier. Shared memory is filled with NaN before each block, and what a launch did not ask for must not be touched.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

typedef void* cudaStream_t;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
enum { cudaSuccess = 0, cudaErrorAssert = 710 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 1 << 16;
constexpr size_t kSharedBytes = 227 << 10;
constexpr unsigned kClusterBlocks = 8;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* at = nullptr;  // the top of its stack while it pauses; null where it has not begun
  bool done = false;
  dim3 index, block;
};

struct Warp {
  Barrier barrier;
  alignas(16) char lanes[32][32];  // what each lane shows to the others
};

inline void* scheduler;  // the top of its stack while a thread runs
inline std::vector<std::unique_ptr<Thread>> threads;  // they outlive their block, and begin anew in the next
inline unsigned count;                                // of the threads in a block
inline unsigned blocks;                               // of the cluster that runs
inline std::vector<Warp> warps;
inline Barrier block_barriers[kClusterBlocks], cluster_barrier;
inline unsigned current;
inline bool progress;
inline bool asserted;  // whether an assertion of a thread has failed in this launch
inline std::function<void()> body;
alignas(1024) inline char shared[kClusterBlocks][kSharedBytes];

// Leaves the registers that a call keeps on the stack, whose top goes to `from`, and goes on where `to` was left. longjmp
// and swapcontext would do, but for the calls of the system that they, or AddressSanitizer around them, make each time.
extern "C" void entrenar_emulator_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak entrenar_emulator_switch
  .hidden entrenar_emulator_switch
entrenar_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .popsection
)");

inline void pause() { entrenar_emulator_switch(&threads[current]->at, scheduler); }

inline void run_thread() {
  for (;;) {
    body();
    threads[current]->done = progress = true;
    pause();
  }
}

inline void resume() {
  Thread& thread = *threads[current];
  threadIdx = thread.index;
  blockIdx = thread.block;
  if (!thread.at) {
    // As if run_thread had been called (there is no way back), and six registers were kept.
    const auto top = reinterpret_cast<void (**)()>((uintptr_t)(thread.stack.get() + kStack) / 16 * 16);
    top[-2] = run_thread;
    thread.at = top - 8;
  }
  entrenar_emulator_switch(&scheduler, thread.at);
}

// The thread ends, as every thread of its block must; it begins anew in the next.
inline void fail(const char* assertion) {
  fprintf(stderr, "block %u, thread %u: assertion `%s` failed\n", blockIdx.x, threadIdx.x, assertion);
  Thread& self = *threads[current];
  asserted = self.done = progress = true;
  self.at = nullptr;
  void* left;
  entrenar_emulator_switch(&left, scheduler);
}

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned self = current, generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.generation++;
  } else {
    while (barrier.generation == generation) pause();
  }
  progress = true;
  threadIdx = threads[self]->index;
  blockIdx = threads[self]->block;
}

inline void wait_for_block() { wait(block_barriers[current / count], count); }
inline void wait_for_cluster() { wait(cluster_barrier, count * blocks); }

// The shared memory of the block that runs.
inline char* shared_memory() { return shared[current / count]; }
inline const char* of_block(const char* address, unsigned rank) { return address - shared_memory() + shared[rank]; }

// Runs the blocks of a cluster, from blockIdx on, at once.
inline void run_cluster(size_t shared_bytes) {
  static const char* const order = getenv("ENTRENAR_EMULATOR_ORDER");
  static const bool reversed = order && !strcmp(order, "reversed");
  count = blockDim.x * blockDim.y * blockDim.z;
  if (blocks > 1 && count % 32) abort();  // a warp would reach into the next block
  const unsigned total = count * blocks;
  for (unsigned b = 0; b < blocks; b++) {
    ASAN_UNPOISON_MEMORY_REGION(shared[b], shared_bytes);
    ASAN_POISON_MEMORY_REGION(shared[b] + shared_bytes, kSharedBytes - shared_bytes);
    memset(shared[b], 0xff, shared_bytes);
    block_barriers[b] = {};
  }
  cluster_barrier = {};
  while (threads.size() < total) threads.emplace_back(new Thread);
  for (unsigned i = 0; i < total; i++) {
    const unsigned t = i % count;
    threads[i]->done = false;
    threads[i]->index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    threads[i]->block = dim3(blockIdx.x + i / count, blockIdx.y, blockIdx.z);
  }
  warps.assign((total + 31) / 32, {});
  for (unsigned done = 0; done < total;) {
    done = 0;
    progress = false;
    for (unsigned i = 0; i < total; i++) {
      current = reversed ? total - 1 - i : i;
      if (!threads[current]->done) resume();
      done += threads[current]->done;
    }
    if (!progress) {
      fprintf(stderr, "threads of a block wait for each other at different barriers\n");
      abort();
    }
  }
}

// f(values, lane) in every lane of a warp, of the values of all its lanes.
template <class T, class F>
void with_warp(const T& value, const F& f) {
  static_assert(sizeof(T) <= sizeof(Warp::lanes[0]), "");
  const unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  const auto values = reinterpret_cast<T*>(warp.lanes);
  memcpy(&values[lane], &value, sizeof value);
  wait(warp.barrier, 32);
  f(static_cast<const T*>(values), static_cast<int>(lane));
  wait(warp.barrier, 32);
}

template <class T, class Source>
T shuffle(T value, const Source& source) {
  T result = value;
  with_warp(value, [&](const T* values, int lane) {
    const int from = source(lane);
    if (from >= 0 && from < 32) memcpy(&result, &values[from], sizeof result);
  });
  return result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle(value, [=](int) { return source & 31; });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, [=](int lane) { return lane ^ mask; });
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return emulator::shuffle(value, [=](int lane) { return lane + offset; });
}

template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  return emulator::shuffle(value, [=](int lane) { return lane - offset; });
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  unsigned result;
  emulator::with_warp(value, [&](const unsigned* values, int) { result = *std::max_element(values, values + 32); });
  return result;
}

inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::warps[emulator::current / 32].barrier, 32); }
inline void __syncthreads() { emulator::wait_for_block(); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

#undef assert
#define assert(condition) ((condition) ? (void)0 : emulator::fail(#condition))

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline int cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::kSharedBytes; break;
    case cudaDevAttrMultiProcessorCount: *value = 1; break;
  }
  return cudaSuccess;
}

template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [=] { kernel(arguments...); };
  emulator::blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) emulator::blocks = attribute.val.clusterDim.x;
  }
  emulator::asserted = false;
  for (unsigned z = 0; z < gridDim.z; z++) {
    for (unsigned y = 0; y < gridDim.y; y++) {
      for (unsigned x = 0; x < gridDim.x; x += emulator::blocks) {
        blockIdx = dim3(x, y, z);
        emulator::run_cluster(config->dynamicSmemBytes);
      }
    }
  }
  return emulator::asserted ? cudaErrorAssert : cudaSuccess;
}
