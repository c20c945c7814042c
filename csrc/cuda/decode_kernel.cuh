// decode: y = x·w + bias + s·b and s = alpha·x·a for at most 32 tokens, in one pass over w.
//
// Block (g, split) multiplies all tokens by the tiles g, g + gridDim.x, ... of w's rows over one
// slice of k, and beside the first of them by all of a over that slice, so that a block reads no
// byte of w or a twice. Warps take turns in k and are added in warp order. With more than one slice
// the block stores its sums; whichever block of a tile arrives last adds all slices in index order
// and finishes the tile. So sizes alone decide the order of every sum, and no block ever waits for
// another.
#pragma once

#include "fma_tile.cuh"
#include "mma_tile.cuh"

namespace lora_kernels {

constexpr int WARPS = 4, THREADS = 32 * WARPS, MAX_TOKENS = 32, RANK_CHUNK = 32;

struct Decode {
  Rows x, w, a;   // [M, K], [N, K], [R, K] as rows; a is not read by tiles without ranks
  const void* b;  // [R, N]
  int64_t b_row, b_col;
  const void* bias;       // [N] or null
  const float* s_given;   // [M, R] or null: then s is computed from a
  const float* alpha_at;  // read on the device if not null, else `alpha` holds
  void* y;                // [M, N]
  float* s;               // [M, R], written if a is multiplied
  float* partials;        // [tiles, splits, M, ROWS + RANKS], ranks in a block's first tile
  int* arrived;           // [tiles], zero before
  float alpha;
  int k, rank, chunk;  // chunk: the k that a split takes, a multiple of the tile's STEP
  bool b_float, y_float;
  bool scale_y;  // y = alpha·x·w: the low-rank product alone
};

// Both tiles keep row (COUNT/8)·g + i of "rows adjacent" operands, and row 8i + g of k-major ones,
// in slot 8i + g.
template <int COUNT>
__device__ int row_of_slot(int slot, bool k_major) {
  return k_major ? slot : COUNT / 8 * (slot % 8) + slot / 8;
}

template <int COUNT>
__device__ int slot_of_row(int row, bool k_major) {
  return k_major ? row : 8 * (row % (COUNT / 8)) + row / (COUNT / 8);
}

template <class T>
__device__ float element(const void* p, int64_t i, bool is_float) {
  return is_float ? static_cast<const float*>(p)[i] : to_float(static_cast<const T*>(p)[i]);
}

// Adds the warps' shares of x·w, and of x·a if the tile has ranks, over [k_begin, k_end) into
// `sums`.
template <class Tile>
__device__ void multiply_tile(const Decode& p, float* sums, int pitch, int row0, int k_begin,
                              int k_end) {
  constexpr int STRIDE = WARPS * Tile::STEP;
  const int warp = threadIdx.x / 32;
  Tile tile;
  typename Tile::Weights weights, next;
  int k = k_begin + warp * Tile::STEP;
  Tile::load(next, p.w, row0, k, k_end);
  for (; k < k_end; k += STRIDE) {
    weights = next;
    // What this step needs comes first: memory answers in the order that it was asked.
    typename Tile::Beside beside;
    Tile::load(beside, p.x, p.a, k, k_end);
    Tile::load(next, p.w, row0, k + STRIDE, k_end);
    tile.step(weights, beside, p.x, p.a, k, k_end);
  }
  for (int turn = 0; turn < WARPS; ++turn) {
    __syncthreads();  // the first: all have read the sums of the tile before
    if (warp == turn) tile.deposit(sums, pitch, turn == 0);
  }
  __syncthreads();
}

// `multiply_tile` by the form of the tile that reads every operand by vectors, where all allow it.
template <class Tile>
__device__ void multiply_rows(const Decode& p, float* sums, int pitch, int row0, int k_begin,
                              int k_end) {
  if (Tile::aligned(p.x, p.w, p.a)) {
    multiply_tile<typename Tile::Aligned>(p, sums, pitch, row0, k_begin, k_end);
  } else {
    multiply_tile<Tile>(p, sums, pitch, row0, k_begin, k_end);
  }
}

// Stores this split's sums of `tile`; true in the block that finds all others' stored, with the
// ordered total in `sums`.
template <int ROWS, int RANKS, int PITCH>
__device__ bool combine_splits(const Decode& p, float* sums, int tile) {
  constexpr int RUNS = (ROWS + RANKS) / 4;
  const int splits = gridDim.y, tokens = p.x.count, first = blockIdx.x;
  const auto part = [&](int of_tile, int split) {
    return reinterpret_cast<float4*>(p.partials) +
           (int64_t(of_tile) * splits + split) * tokens * RUNS;
  };
  for (int i = threadIdx.x; i < tokens * RUNS; i += THREADS) {
    if (tile == first || i % RUNS < ROWS / 4) {
      part(tile, blockIdx.y)[i] =
          *reinterpret_cast<const float4*>(sums + i / RUNS * PITCH + i % RUNS * 4);
    }
  }
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(p.arrived + tile, 1) == splits - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int i = threadIdx.x; i < tokens * RUNS; i += THREADS) {
    const int of_tile = i % RUNS < ROWS / 4 ? tile : first;
    float4 total = __ldcg(part(of_tile, 0) + i);
#pragma unroll 4
    for (int split = 1; split < splits; ++split) {
      const float4 v = __ldcg(part(of_tile, split) + i);
      total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    *reinterpret_cast<float4*>(sums + i / RUNS * PITCH + i % RUNS * 4) = total;
  }
  __syncthreads();
  return true;
}

// y, and s where a was multiplied, from the sums of `tile`.
template <class Tile, bool W_K_MAJOR, int PITCH>
__device__ void finish_tile(const Decode& p, const float* sums, int tile) {
  using T = typename Tile::Element;
  const float alpha = p.alpha_at ? *p.alpha_at : p.alpha;
  const int slot = threadIdx.x % Tile::ROWS;
  const int n = tile * Tile::ROWS + row_of_slot<Tile::ROWS>(slot, W_K_MAJOR);
  const int count = p.w.count;
  constexpr int GROUPS = THREADS / Tile::ROWS, PER_THREAD = (Tile::TOKENS + GROUPS - 1) / GROUPS;
  constexpr int AT_ONCE = 8;
  const int m0 = threadIdx.x / Tile::ROWS;  // this thread's tokens: m0, m0 + GROUPS, ...
  float lowrank[PER_THREAD] = {};
  __shared__ float s[Tile::TOKENS][RANK_CHUNK];
  for (int r0 = 0; r0 < p.rank; r0 += RANK_CHUNK) {
    __syncthreads();
    const int ranks = min(RANK_CHUNK, p.rank - r0);
    for (int i = threadIdx.x; i < p.x.count * ranks; i += THREADS) {
      const int m = i / ranks, r = i % ranks;
      float value;
      if constexpr (Tile::RANKS > 0) {
        value = alpha * sums[m * PITCH + Tile::ROWS + slot_of_row<Tile::RANKS>(r, p.a.k_major)];
        if (tile == 0) p.s[m * p.rank + r] = value;
      } else {
        value = p.s_given[int64_t(m) * p.rank + r0 + r];
      }
      s[m][r] = value;
    }
    __syncthreads();
    for (int r = 0; n < count && r < ranks; r += AT_ONCE) {
      float b[AT_ONCE];  // asked for together, as memory answers late
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const int64_t at = (r0 + r + j) * p.b_row + n * p.b_col;
        b[j] = r + j < ranks ? element<T>(p.b, at, p.b_float) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        if (r + j >= ranks) break;
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i)
          lowrank[i] = fmaf(s[m0 + i * GROUPS][r + j], b[j], lowrank[i]);
      }
    }
  }
  if (n >= count) return;
  const float bias = p.bias ? element<T>(p.bias, n, false) : 0.0f;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int m = m0 + i * GROUPS;
    if (m >= p.x.count) break;
    const float product = sums[m * PITCH + slot] * (p.scale_y ? alpha : 1.0f);
    const float value = (product + bias) + lowrank[i];
    if (p.y_float) {
      static_cast<float*>(p.y)[int64_t(m) * count + n] = value;
    } else {
      static_cast<T*>(p.y)[int64_t(m) * count + n] = from_float<T>(value);
    }
  }
}

template <class Tile, bool W_K_MAJOR>
__global__ void __launch_bounds__(THREADS, 2) decode_kernel(const __grid_constant__ Decode p) {
  constexpr int ROWS = Tile::ROWS, RANKS = Tile::RANKS;
  // 4 mod 16: the 8 x 4 threads of a warp deposit into 32 different banks.
  constexpr int PITCH = ROWS + RANKS + 4;
  __shared__ __align__(16) float sums[Tile::TOKENS * PITCH];
  const int k_begin = blockIdx.y * p.chunk, k_end = min(p.k, k_begin + p.chunk);
  for (int tile = blockIdx.x; tile * ROWS < p.w.count; tile += gridDim.x) {
    if (RANKS == 0 || tile == blockIdx.x) {
      multiply_rows<Tile>(p, sums, PITCH, tile * ROWS, k_begin, k_end);
    } else {
      multiply_rows<typename Tile::WithoutRanks>(p, sums, PITCH, tile * ROWS, k_begin, k_end);
    }
    if (gridDim.y == 1 || combine_splits<ROWS, RANKS, PITCH>(p, sums, tile)) {
      finish_tile<Tile, W_K_MAJOR, PITCH>(p, sums, tile);
    }
  }
}

}  // namespace lora_kernels
