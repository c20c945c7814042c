// The table for processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "elements.h"
#include "quantized.h"

#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

namespace lora_kernels {
namespace {
#include "vector_avx512.h"
#include "vector_tiles.h"
#include "vector_tiles_quantized.h"
}  // namespace

constexpr Kernels AVX512_KERNELS = table("avx512");

}  // namespace lora_kernels
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
