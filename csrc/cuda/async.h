// Copies into shared memory that a thread does not wait for.
#pragma once

#include "floats.h"

namespace entrenar {

// 16 aligned bytes from global to shared memory; or, where they are not `given`, as many zeros.
static __device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool given = true) {
#if defined(ENTRENAR_EMULATED)
  given ? memcpy(shared, global, 16) : memset(shared, 0, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(given ? 16 : 0)
               : "memory");
#endif
}

// The same of 4 aligned bytes.
static __device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool given = true) {
#if defined(ENTRENAR_EMULATED)
  given ? memcpy(shared, global, 4) : memset(shared, 0, 4);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(given ? 4 : 0)
               : "memory");
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
