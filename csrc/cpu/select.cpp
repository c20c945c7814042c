// The choice of a table of kernels for the processor at hand.
#include <ATen/Version.h>

#include <atomic>
#include <string>

#include "kernels.h"

namespace lora_kernels {
namespace {

// What this processor runs, best first, as far as ATen's own capability (ATEN_CPU_CAPABILITY)
// allows.
const Kernels* supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool allowed = at::get_cpu_capability() == "AVX512" || !name.empty();
  const auto is = [&](const char* other) { return name.empty() || name == other; };
  if (avx512 && allowed && __builtin_cpu_supports("avx512bf16") && is("avx512_bf16"))
    return &AVX512_BF16_KERNELS;
  if (avx512 && allowed && is("avx512")) return &AVX512_KERNELS;
  if (avx2 && at::get_cpu_capability() != "DEFAULT" && is("avx2")) return &AVX2_KERNELS;
#endif
  return nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{supported("")};
  return table;
}

}  // namespace

const Kernels* kernels() { return chosen(); }

bool use_kernels(const char* name) {
  const Kernels* table = supported(name);
  if (table != nullptr) chosen() = table;
  return table != nullptr;
}

}  // namespace lora_kernels
