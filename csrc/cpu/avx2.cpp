// The table for processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "elements.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace lora_kernels {
namespace {
#include "vector_avx2.h"
#include "vector_tiles.h"
}  // namespace

const Kernels AVX2_KERNELS = {
    "avx2",        Vector::TILE_ROWS,
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
