// A warp's tile of x·w and x·a for bfloat16 and float16, on mma.sync m16n8k16: rows of w are the M
// operand, tokens the N.
//
// The order of k inside a step is free as long as both operands agree. Thread (g, t) = (lane / 4,
// lane % 4) takes k = 8t .. 8t+7 of a step of 32, which is one 16-byte load a row; a step is two
// mma, the first on k = 8t .. 8t+3. The order of rows is free too: with rows adjacent in memory
// thread g takes 2·TILES neighbouring ones, one load a k.
#pragma once

#include "operands.cuh"

namespace lora_kernels {

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int TILES>
struct VectorOf;
template <>
struct VectorOf<1> {
  using type = unsigned;
};
template <>
struct VectorOf<2> {
  using type = uint2;
};
template <>
struct VectorOf<4> {
  using type = uint4;
};

// A thread's share of 16·TILES rows and 32 k, as loaded: nothing waits for the data until `operand`
// asks for it.
template <int TILES, bool STREAM, bool ALIGNED>
struct Fragment {
  uint32_t word[8 * TILES];

  // The alignment in bytes that one load needs.
  __device__ static int vector_bytes(bool k_major) { return k_major ? 16 : 4 * TILES; }

  __device__ void load(const Rows& rows, bool k_major, int row0, int k0, int k_end) {
    const int g = (threadIdx.x % 32) / 4, k = k0 + 8 * (threadIdx.x % 4);
    const auto* data = static_cast<const uint16_t*>(rows.data);
    const bool vector = rows.align >= vector_bytes(k_major);
    if (k_major) {
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) {  // tile i / 2, upper or lower eight rows
        const int row = row0 + 8 * i + g;
        const int valid = row < rows.count ? k_end - k : 0;
        const uint4 run = load_run<uint4, uint16_t, 8, STREAM, ALIGNED>(
            data + row * rows.stride + k, valid, vector);
        word[4 * i] = run.x, word[4 * i + 1] = run.y, word[4 * i + 2] = run.z,
                 word[4 * i + 3] = run.w;
      }
    } else {
      using Vector = typename VectorOf<TILES>::type;
      const int row = row0 + 2 * TILES * g;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int valid = k + i < k_end ? rows.count - row : 0;
        union {
          Vector run;
          uint32_t part[TILES];
        };
        run = load_run<Vector, uint16_t, 2 * TILES, STREAM, ALIGNED>(
            data + (k + i) * rows.stride + row, valid, vector);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) word[TILES * i + tile] = part[tile];
      }
    }
  }

  // The mma's first operand for `tile` and half step `half`.
  __device__ void operand(uint32_t (&a)[4], bool k_major, int tile, int half) const {
    if (k_major) {
      const int upper = 8 * tile + 2 * half, lower = upper + 4;
      a[0] = word[upper], a[1] = word[lower], a[2] = word[upper + 1], a[3] = word[lower + 1];
    } else {  // a word holds two rows of one k; the mma wants two k of one row
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t first = word[TILES * (4 * half + 2 * pair) + tile];
        const uint32_t second = word[TILES * (4 * half + 2 * pair + 1) + tile];
        a[2 * pair] = __byte_perm(first, second, 0x5410);
        a[2 * pair + 1] = __byte_perm(first, second, 0x7632);
      }
    }
  }
};

// Sums of 64 rows of w, and of 16·RANK_TILES rows of a, with 8·TOKEN_TILES tokens. ALIGNED: every
// operand is read by vectors, so that nothing stands between the loads of a step.
template <class T, int TOKEN_TILES, int RANK_TILES, bool W_K_MAJOR, bool ALIGNED = false>
struct MmaTile {
  using Element = T;
  static constexpr int TOKENS = 8 * TOKEN_TILES, ROWS = 64, RANKS = 16 * RANK_TILES, STEP = 32;
  using Adapters = Fragment<RANK_TILES ? RANK_TILES : 1, false, ALIGNED>;
  using WithoutRanks = MmaTile<T, TOKEN_TILES, 0, W_K_MAJOR, ALIGNED>;
  using Aligned = MmaTile<T, TOKEN_TILES, RANK_TILES, W_K_MAJOR, true>;

  using Weights = Fragment<4, true, ALIGNED>;

  // What a step multiplies rows of w by, x, and the rows of a.
  struct Beside {
    uint4 x[TOKEN_TILES];
    Adapters a;
  };

  float w[4][TOKEN_TILES][4] = {};
  float a[RANK_TILES ? RANK_TILES : 1][TOKEN_TILES][4] = {};

  __device__ static bool aligned(const Rows& x, const Rows& w, const Rows& a) {
    const bool of_a = RANK_TILES == 0 || a.align >= Adapters::vector_bytes(a.k_major);
    return x.align >= 16 && w.align >= 16 && of_a;
  }

  __device__ static void load(Weights& weights, const Rows& rows, int row0, int k, int k_end) {
    weights.load(rows, W_K_MAJOR, row0, k, k_end);
  }

  __device__ static void load(Beside& beside, const Rows& x_rows, const Rows& a_rows, int k,
                              int k_end) {
    const int g = (threadIdx.x % 32) / 4, k_x = k + 8 * (threadIdx.x % 4);
#pragma unroll
    for (int token = 0; token < TOKEN_TILES; ++token) {
      const int m = 8 * token + g;
      beside.x[token] = load_run<uint4, uint16_t, 8, false, ALIGNED>(
          static_cast<const uint16_t*>(x_rows.data) + m * x_rows.stride + k_x,
          m < x_rows.count ? k_end - k_x : 0, x_rows.align >= 16);
    }
    if constexpr (RANK_TILES > 0) beside.a.load(a_rows, a_rows.k_major, 0, k, k_end);
  }

  __device__ void step(const Weights& weights, const Beside& beside, const Rows&,
                       const Rows& a_rows, int, int) {
    multiply(w, weights, W_K_MAJOR, beside.x);
    if constexpr (RANK_TILES > 0) {
      if (a_rows.k_major) {
        multiply(a, beside.a, true, beside.x);
      } else {
        multiply(a, beside.a, false, beside.x);
      }
    }
  }

  // Adds the tile to sums[token][pitch]: w's rows, then a's, both in the order of `row_of_slot`.
  __device__ void deposit(float* sums, int pitch, bool first) const {
    deposit_part(w, sums, pitch, first);
    if constexpr (RANK_TILES > 0) deposit_part(a, sums + ROWS, pitch, first);
  }

 private:
  template <int TILES, bool STREAM>
  __device__ static void multiply(float (&c)[TILES][TOKEN_TILES][4],
                                  const Fragment<TILES, STREAM, ALIGNED>& rows, bool k_major,
                                  const uint4 (&x)[TOKEN_TILES]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t operand[4];
        rows.operand(operand, k_major, tile, half);
#pragma unroll
        for (int token = 0; token < TOKEN_TILES; ++token) {
          const uint4 v = x[token];
          mma(c[tile][token], operand, half ? v.z : v.x, half ? v.w : v.y, T());
        }
      }
    }
  }

  template <int TILES>
  __device__ static void deposit_part(const float (&c)[TILES][TOKEN_TILES][4], float* sums,
                                      int pitch, bool first) {
    const int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int token = 0; token < TOKEN_TILES; ++token) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[(8 * token + 2 * t + i % 2) * pitch + 16 * tile + 8 * (i / 2) + g];
          sum = first ? c[tile][token][i] : sum + c[tile][token][i];
        }
      }
    }
  }
};

}  // namespace lora_kernels
