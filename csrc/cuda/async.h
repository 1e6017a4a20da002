// Copies into shared memory that a thread does not wait for.
#pragma once

#include "floats.h"

namespace entrenar {

// 16 aligned bytes from global to shared memory.
static __device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
#if defined(ENTRENAR_EMULATED)
  memcpy(shared, global, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global)
               : "memory");
#endif
}

// Waits for the thread's own copies.
static __device__ __forceinline__ void wait_for_copies() {
#if !defined(ENTRENAR_EMULATED)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace entrenar
