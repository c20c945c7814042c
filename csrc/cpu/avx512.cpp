// The table for processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "elements.h"

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
}  // namespace

const Kernels AVX512_KERNELS = {
    "avx512",      Vector::TILE_ROWS,
    Vector::LANES, copy,
    pack,          store,
    mask,          multiply_rows<FloatUnit, Vector::TILE_ROWS>,
    dots,          nullptr,
    nullptr,       nullptr,
};

}  // namespace lora_kernels
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
