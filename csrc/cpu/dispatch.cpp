// Chooses the level once, the best that the machine has; another can be set, which is how every level is tested.
#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

namespace entrenar {

namespace {

enum Level : int64_t { kBase, kAvx2, kAvx512, kLevels };

bool has(int64_t level) {
#if defined(__x86_64__)
  if (level == kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (level == kAvx512) {
    return has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return level == kBase;
}

int64_t best() {
  int64_t level = kLevels - 1;
  while (!has(level)) level--;
  return level;
}

std::atomic<int64_t>& current() {
  static std::atomic<int64_t> level(best());
  return level;
}

int64_t cpu_level() { return current(); }

bool set_cpu_level(int64_t level) {
  if (!has(level)) return false;
  current() = level;
  return true;
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels* const levels[] = {&kernels_base, &kernels_avx2, &kernels_avx512};
  return *levels[current()];
#else
  return kernels_base;
#endif
}

STABLE_TORCH_LIBRARY_IMPL(entrenar, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
  m.impl("set_cpu_level", TORCH_BOX(&set_cpu_level));
}

}  // namespace entrenar
