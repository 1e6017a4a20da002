// Chooses the level once, the best that the machine has; another can be set, which is how every level is tested.
#include "dispatch.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace entrenar {

namespace {

enum Level : int64_t { kBase, kAvx2, kAvx512, kAmx, kLevels };

#if defined(__x86_64__)
// Whether the processor has them, and the system lets this process use them once it has asked for them.
bool has_matrix_registers() {
  constexpr unsigned kBFloat16 = 1u << 22, kRegisters = 1u << 24;  // of EDX
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBFloat16) || !(d & kRegisters)) return false;
  constexpr long kRequestFeature = 0x1023, kRegistersFeature = 18;
  return syscall(SYS_arch_prctl, kRequestFeature, kRegistersFeature) == 0;
}
#endif

bool has(int64_t level) {
#if defined(__x86_64__)
  if (level == kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (level == kAvx512) {
    return has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi");
  }
  if (level == kAmx) return has(kAvx512) && has_matrix_registers();
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
  static const Kernels* const levels[] = {&kernels_base, &kernels_avx2, &kernels_avx512, &kernels_amx};
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
