// A warp's tile of x·w for float32 w (or float32 a beside a half x): exact float32 products, no
// tensor cores, no TF32.
//
// Thread (g, t) = (lane / 4, lane % 4) takes k = 4t .. 4t+3 of a step of 16 and four rows; the four
// threads of a group are added once at the end.
#pragma once

#include "operands.cuh"

namespace lora_kernels {

// Sums of 32 rows of w with 8·TOKEN_TILES tokens. It has no rows of a: their sums would not fit the
// registers.
template <class T, int TOKEN_TILES, bool W_K_MAJOR>
struct FmaTile {
  using Element = T;
  static constexpr int TOKENS = 8 * TOKEN_TILES, ROWS = 32, RANKS = 0, STEP = 16;
  using WithoutRanks = FmaTile;
  using Aligned = FmaTile;

  struct Beside {};  // x is read where it is multiplied

  struct Weights {
    float4 run[4];  // W_K_MAJOR: run i is row g + 8i; else it is k = 4t + i of rows 4g .. 4g+3
  };

  float sums_of[4][TOKENS] = {};

  __device__ static bool aligned(const Rows&, const Rows&, const Rows&) { return true; }

  __device__ static void load(Beside&, const Rows&, const Rows&, int, int) {}

  __device__ static void load(Weights& weights, const Rows& rows, int row0, int k0, int k_end) {
    const int g = (threadIdx.x % 32) / 4, k = k0 + 4 * (threadIdx.x % 4);
    const auto* data = static_cast<const float*>(rows.data);
    const bool vector = rows.align >= 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (W_K_MAJOR) {
        const int row = row0 + 8 * i + g;
        const int valid = row < rows.count ? k_end - k : 0;
        weights.run[i] =
            load_run<float4, float, 4, true>(data + row * rows.stride + k, valid, vector);
      } else {
        const int row = row0 + 4 * g;
        const int valid = k + i < k_end ? rows.count - row : 0;
        weights.run[i] =
            load_run<float4, float, 4, true>(data + (k + i) * rows.stride + row, valid, vector);
      }
    }
  }

  __device__ void step(const Weights& weights, const Beside&, const Rows& x_rows, const Rows&,
                       int k0, int k_end) {
    const int k = k0 + 4 * (threadIdx.x % 4);
#pragma unroll
    for (int m = 0; m < TOKENS; ++m) {
      if (m >= x_rows.count) break;
      float x[4];
      load_x(x, x_rows, m, k, k_end);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float v = W_K_MAJOR ? component(weights.run[i], j) : component(weights.run[j], i);
          sums_of[i][m] = fmaf(v, x[j], sums_of[i][m]);
        }
      }
    }
  }

  // Adds the tile to sums[token][pitch], rows in the order of `row_of_slot`.
  __device__ void deposit(float* sums, int pitch, bool first) const {
    const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int m = 0; m < TOKENS; ++m) {
        float v = sums_of[i][m];
        v += __shfl_xor_sync(0xffffffff, v, 1);
        v += __shfl_xor_sync(0xffffffff, v, 2);
        float& sum = sums[m * pitch + 8 * i + g];
        if (t == m % 4) sum = first ? v : sum + v;
      }
    }
  }

 private:
  __device__ static float component(const float4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }

  __device__ static void load_x(float (&x)[4], const Rows& rows, int m, int k, int k_end) {
    const T* p = static_cast<const T*>(rows.data) + m * rows.stride + k;
    const int valid = k_end - k;
    if constexpr (sizeof(T) == 4) {
      const float4 v = load_run<float4, float, 4, false>(p, valid, rows.align >= 16);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      union {
        uint2 run;
        uint16_t bits[4];
      };
      run = load_run<uint2, uint16_t, 4, false>(reinterpret_cast<const uint16_t*>(p), valid,
                                                rows.align >= 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        T v;
        memcpy(&v, &bits[i], 2);
        x[i] = to_float(v);
      }
    }
  }
};

}  // namespace lora_kernels
