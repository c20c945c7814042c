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

const Kernels AVX512_KERNELS = {
    .name = "avx512",
    .rows = Vector::TILE_ROWS,
    .lanes = Vector::LANES,
    .copy = copy,
    .pack = pack,
    .store = store,
    .mask = mask,
    .multiply = multiply_rows<FloatUnit<float>, Vector::TILE_ROWS>,
    .multiply_in_place = multiply_in_place,
    .dots = dots,
    .rows_of_w = rows_of_w,
    .decode = decode,
    .quantized_dots = quantized_dots,
    .quantized_rows = quantized_rows,
    .arrange = arrange,
    .squares = squares,
};

}  // namespace lora_kernels
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
