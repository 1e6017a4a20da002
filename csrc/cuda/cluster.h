// Blocks of a cluster, which run at once and read each other's shared memory: from compute capability 9.0 on.
#pragma once

#include "floats.h"

namespace entrenar {

// All threads of all blocks of the cluster arrive, those of a warp perhaps one by one, and see what the others wrote
// before.
static __device__ __forceinline__ void cluster_barrier() {
#if defined(ENTRENAR_EMULATED)
  emulator::wait_for_cluster();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same in two halves, and what was written before need not be seen: of use where blocks only wait for the others to
// have read.
static __device__ __forceinline__ void cluster_arrive() {
#if !defined(ENTRENAR_EMULATED) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

static __device__ __forceinline__ void cluster_wait() {
#if defined(ENTRENAR_EMULATED)
  emulator::wait_for_cluster();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait;" ::: "memory");
#endif
}

// Where the block of that rank in the cluster has what this block has at `shared`.
template <class T>
static __device__ __forceinline__ const T* of_block(const T* shared, unsigned rank) {
#if defined(ENTRENAR_EMULATED)
  return (const T*)emulator::of_block((const char*)shared, rank);
#elif __CUDA_ARCH__ >= 900
  const T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
#else
  return shared;
#endif
}

}  // namespace entrenar
