// The table for processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "elements.h"
#include "quantized.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lora_kernels {
namespace {
#include "vector_avx2.h"
#include "vector_tiles.h"
#include "vector_tiles_quantized.h"
}  // namespace

constexpr Kernels AVX2_KERNELS = table("avx2");

}  // namespace lora_kernels
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
