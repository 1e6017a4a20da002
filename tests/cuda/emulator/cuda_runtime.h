// CUDA's run-time interface, as far as the kernels use it, on the CPU: a fiber for each thread of a block, switched at
// shuffles and barriers. EMULATE_REVERSED runs the threads in the other order, which shows a missing barrier.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

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

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = false;
};

struct Warp {
  Barrier barrier;
  uint64_t lanes[32];
};

inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline unsigned current;
inline bool progress;
inline std::function<void()> body;

inline void pause() { swapcontext(&threads[current].context, &scheduler); }

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.generation++;
  } else {
    while (barrier.generation == generation) pause();
  }
  progress = true;
}

inline void run_thread() {
  body();
  threads[current].done = progress = true;
  pause();
}

inline void run_block() {
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  threads = std::vector<Thread>(count);
  warps.assign((count + 31) / 32, {});
  block_barrier = {};
  for (unsigned i = 0; i < count; i++) {
    Thread& thread = threads[i];
    thread.stack.reset(new char[kStack]);
    thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, run_thread, 0);
  }
  unsigned done = 0;
  while (done < count) {
    done = 0;
    progress = false;
    for (unsigned i = 0; i < count; i++) {
#if defined(EMULATE_REVERSED)
      current = count - 1 - i;
#else
      current = i;
#endif
      if (!threads[current].done) {
        threadIdx = threads[current].index;
        swapcontext(&scheduler, &threads[current].context);
      }
      done += threads[current].done;
    }
    if (!progress) {
      fprintf(stderr, "threads of a block wait for each other at different barriers\n");
      abort();
    }
  }
}

template <class T>
T shuffle(T value, int (*source)(int lane, int argument), int argument) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "");
  const unsigned self = current, lane = self % 32;
  Warp& warp = warps[self / 32];
  __builtin_memcpy(&warp.lanes[lane], &value, sizeof value);
  wait(warp.barrier, 32);
  const int from = source(lane, argument);
  T result = value;
  if (from >= 0 && from < 32) __builtin_memcpy(&result, &warp.lanes[from], sizeof result);
  wait(warp.barrier, 32);
  threadIdx = threads[self].index;
  return result;
}

}  // namespace emulator

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, [](int lane, int mask) { return lane ^ mask; }, mask);
}

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return emulator::shuffle(value, [](int lane, int offset) { return lane + offset; }, offset);
}

inline void __syncthreads() {
  const unsigned self = emulator::current;
  emulator::wait(emulator::block_barrier, (unsigned)emulator::threads.size());
  threadIdx = emulator::threads[self].index;
}

template <class... Parameters, class... Arguments>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulator::body = [=] { kernel(arguments...); };
  for (unsigned z = 0; z < gridDim.z; z++) {
    for (unsigned y = 0; y < gridDim.y; y++) {
      for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = dim3(x, y, z);
        emulator::run_block();
      }
    }
  }
  return cudaSuccess;
}
