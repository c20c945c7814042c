// Operands of the decode kernels in memory, and how a thread reads its share of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lora_kernels {

// `count` rows of K elements: w is N rows, a is R rows, x is M rows. Either the elements of a row
// are adjacent in memory (k_major) and `stride` leads to the next row, or the rows' k-th elements
// are adjacent and `stride` leads to the next k.
struct Rows {
  const void* data;
  int64_t stride;
  int count;
  int align;  // bytes that divide the address, the stride and the length of every contiguous run;
              // at most 16
  bool k_major;
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// One load of sizeof(V) bytes. w streams past the caches' reuse order: each of its bytes is read
// once per call.
template <class V, bool STREAM>
__device__ V load_vector(const void* address) {
  const V* p = static_cast<const V*>(address);
  if constexpr (STREAM) return __ldcs(p);
  return __ldg(p);
}

// `COUNT` adjacent elements as one vector V, or one by one where the alignment forbids that (not
// `vector`, which ALIGNED promises); elements from `valid` on are zero and not read. With an
// alignment of sizeof(V) the runs' lengths are multiples of COUNT: all or none is valid.
template <class V, class Bits, int COUNT, bool STREAM, bool ALIGNED = false>
__device__ V load_run(const Bits* p, int valid, bool vector) {
  static_assert(sizeof(V) == COUNT * sizeof(Bits));
  union {
    V whole;
    Bits part[COUNT];
  } run;
  if (ALIGNED || vector) {
    run.whole = V();
    if (valid > 0) run.whole = load_vector<V, STREAM>(p);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      run.part[i] = i < valid ? load_vector<Bits, STREAM>(p + i) : Bits(0);
  }
  return run.whole;
}

}  // namespace lora_kernels
