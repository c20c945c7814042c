// wgrad: out = leftᵀ·right over at most 32 tokens, one operand wide (x or dy) and the other
// low-rank (q or s).
//
// A thread keeps one column of the wide operand in registers and multiplies it by eight columns of
// the low-rank one.
#pragma once

#include "operands.cuh"

namespace lora_kernels {

constexpr int OUTER_THREADS = 128, OUTER_RANKS = 8, OUTER_TOKENS = 32;

struct Wgrad {
  const void* wide;      // [tokens, columns]
  const float* lowrank;  // [tokens, rank], contiguous
  void* out;             // element (column, r) at column·out_column + r·out_rank
  int64_t wide_row, wide_column, out_column, out_rank;
  int tokens, columns, rank;
};

template <class T, class Out>
__global__ void __launch_bounds__(OUTER_THREADS) wgrad_kernel(const __grid_constant__ Wgrad p) {
  const int column = blockIdx.x * OUTER_THREADS + threadIdx.x, r0 = blockIdx.y * OUTER_RANKS;
  if (column >= p.columns) return;
  const T* wide = static_cast<const T*>(p.wide) + column * p.wide_column;
  float v[OUTER_TOKENS];
#pragma unroll
  for (int m = 0; m < OUTER_TOKENS; ++m)
    v[m] = m < p.tokens ? to_float(wide[m * p.wide_row]) : 0.0f;
  Out* out = static_cast<Out*>(p.out) + column * p.out_column;
  for (int r = r0; r < min(r0 + OUTER_RANKS, p.rank); ++r) {
    float sum = 0.0f;
#pragma unroll
    for (int m = 0; m < OUTER_TOKENS; ++m) {
      if (m < p.tokens) sum = fmaf(v[m], p.lowrank[m * p.rank + r], sum);
    }
    out[r * p.out_rank] = from_float<Out>(sum);
  }
}

}  // namespace lora_kernels
