// CUDA's run-time interface, as far as the kernels use it, on the CPU: a fiber for each thread of a block, switched at
// shuffles and barriers. With ENTRENAR_EMULATOR_ORDER=reversed the threads run in the other order, which shows a missing
// barrier. Shared memory is filled with NaN before each block.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

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
enum { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 1 << 16;
constexpr size_t kSharedBytes = 227 << 10;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  dim3 index;
};

struct Warp {
  Barrier barrier;
  uint64_t lanes[32];
  uint32_t a[32][4], b[32][2];  // of a product by the tensor cores
};

inline jmp_buf scheduler;
inline std::vector<std::unique_ptr<Thread>> threads;  // they outlive their block, and begin anew in the next
inline unsigned count;                                // of the threads in a block
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline unsigned current;
inline bool progress;
inline std::function<void()> body;
alignas(1024) inline char shared[kSharedBytes];

// Fibers begin by makecontext, and are switched by jumps: swapcontext would call the system each time.
inline void pause() {
  if (!_setjmp(threads[current]->at)) _longjmp(scheduler, 1);
}

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
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.at, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = kStack;
  makecontext(&thread.start, run_thread, 0);
  setcontext(&thread.start);
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
}

inline void run_block(size_t shared_bytes) {
  static const char* const order = getenv("ENTRENAR_EMULATOR_ORDER");
  static const bool reversed = order && !strcmp(order, "reversed");
  count = blockDim.x * blockDim.y * blockDim.z;
  memset(shared, 0xff, shared_bytes);
  while (threads.size() < count) threads.emplace_back(new Thread);
  for (unsigned i = 0; i < count; i++) {
    threads[i]->done = false;
    threads[i]->index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  }
  warps.assign((count + 31) / 32, {});
  block_barrier = {};
  for (unsigned done = 0; done < count;) {
    done = 0;
    progress = false;
    for (unsigned i = 0; i < count; i++) {
      current = reversed ? count - 1 - i : i;
      if (!threads[current]->done) resume();
      done += threads[current]->done;
    }
    if (!progress) {
      fprintf(stderr, "threads of a block wait for each other at different barriers\n");
      abort();
    }
  }
}

template <class T, class Source>
T shuffle(T value, const Source& source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  const unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  memcpy(&warp.lanes[lane], &value, sizeof value);
  wait(warp.barrier, 32);
  const int from = source((int)lane);
  T result = value;
  if (from >= 0 && from < 32) memcpy(&result, &warp.lanes[from], sizeof result);
  wait(warp.barrier, 32);
  return result;
}

// mma.sync.m16n8k16: the layout of its operands is PTX's.
inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned lane = current % 32;
  Warp& warp = warps[current / 32];
  memcpy(warp.a[lane], a, sizeof a);
  memcpy(warp.b[lane], b, sizeof b);
  wait(warp.barrier, 32);
  const auto element = [](const uint32_t* words, int word, int k) {
    const uint32_t bits = (words[word] >> k % 2 * 16) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int i = 0; i < 4; i++) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; k++) {
      d[i] += element(warp.a[row * 4 + k % 8 / 2], i / 2 + k / 8 * 2, k) * element(warp.b[column * 4 + k % 8 / 2], k / 8, k);
    }
  }
  wait(warp.barrier, 32);
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

inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::warps[emulator::current / 32].barrier, 32); }
inline void __syncthreads() { emulator::wait(emulator::block_barrier, emulator::count); }

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <class T>
void __stcg(T* pointer, T value) {
  *pointer = value;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; z++) {
    for (unsigned y = 0; y < gridDim.y; y++) {
      for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = dim3(x, y, z);
        emulator::run_block(config->dynamicSmemBytes);
      }
    }
  }
  return cudaSuccess;
}
