// Copies into shared memory that a thread does not wait for.
#pragma once

#include "floats.h"

namespace entrenar {

// 4, 8 or 16 aligned bytes from global to shared memory; or, where they are not `given`, as many zeros.
template <int kBytes>
static __device__ __forceinline__ void copy_async(void* shared, const void* global, bool given = true) {
#if defined(ENTRENAR_EMULATED)
  given ? memcpy(shared, global, kBytes) : memset(shared, 0, kBytes);
#else
  const auto to = (unsigned)__cvta_generic_to_shared(shared);
  const int from = given ? kBytes : 0;
  if constexpr (kBytes == 16) {  // these alone can pass by the first cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(from)
                 : "memory");
  }
#endif
}

// Makes a group of the thread's copies since the last one.
static __device__ __forceinline__ void group_copies() {
#if !defined(ENTRENAR_EMULATED)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the thread's own groups but the last kLeft.
template <int kLeft>
static __device__ __forceinline__ void wait_for_groups() {
#if !defined(ENTRENAR_EMULATED)
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace entrenar
