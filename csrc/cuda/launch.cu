// All kernels that ship: every instance that the launchers can pick.
#include "decode_kernel.cuh"
#include "launch.h"
#include "wgrad_kernel.cuh"

namespace lora_kernels {
namespace {

template <class Tile, bool W_K_MAJOR>
cudaError_t launch_tile(const Decode& p, dim3 grid, cudaStream_t stream) {
  decode_kernel<Tile, W_K_MAJOR><<<grid, THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T, int TOKEN_TILES>
cudaError_t launch_mma(const Decode& p, int fused_rank, dim3 grid, cudaStream_t stream) {
  if (!p.w.k_major) return launch_tile<MmaTile<T, TOKEN_TILES, 0, false>, false>(p, grid, stream);
  if (fused_rank > 16) return launch_tile<MmaTile<T, TOKEN_TILES, 2, true>, true>(p, grid, stream);
  if (fused_rank > 0) return launch_tile<MmaTile<T, TOKEN_TILES, 1, true>, true>(p, grid, stream);
  return launch_tile<MmaTile<T, TOKEN_TILES, 0, true>, true>(p, grid, stream);
}

template <class T, int TOKEN_TILES>
cudaError_t launch_fma(const Decode& p, dim3 grid, cudaStream_t stream) {
  if (p.w.k_major) return launch_tile<FmaTile<T, TOKEN_TILES, true>, true>(p, grid, stream);
  return launch_tile<FmaTile<T, TOKEN_TILES, false>, false>(p, grid, stream);
}

template <class T>
cudaError_t launch_tokens(const Decode& p, Type w, int fused_rank, dim3 grid, cudaStream_t stream) {
  const int tokens = p.x.count;
  if constexpr (sizeof(T) == 2) {
    if (w != Type::float32) {
      if (tokens <= 8) return launch_mma<T, 1>(p, fused_rank, grid, stream);
      if (tokens <= 16) return launch_mma<T, 2>(p, fused_rank, grid, stream);
      return launch_mma<T, 4>(p, fused_rank, grid, stream);
    }
  }
  if (tokens <= 8) return launch_fma<T, 1>(p, grid, stream);
  if (tokens <= 16) return launch_fma<T, 2>(p, grid, stream);
  return launch_fma<T, 4>(p, grid, stream);
}

template <class T, class Out>
cudaError_t launch_outer(const Wgrad& p, cudaStream_t stream) {
  const dim3 grid((p.columns + OUTER_THREADS - 1) / OUTER_THREADS,
                  (p.rank + OUTER_RANKS - 1) / OUTER_RANKS);
  wgrad_kernel<T, Out><<<grid, OUTER_THREADS, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int rows_per_tile(Type w) { return w == Type::float32 ? 32 : 64; }

int step_of(Type w) { return w == Type::float32 ? 16 : 32; }

int ranks_per_tile(int fused_rank) { return (fused_rank + 15) / 16 * 16; }

cudaError_t launch_decode(const Decode& p, Type x, Type w, int fused_rank, dim3 grid,
                          cudaStream_t stream) {
  if (x == Type::float32) return launch_tokens<float>(p, w, fused_rank, grid, stream);
  if (x == Type::float16) return launch_tokens<__half>(p, w, fused_rank, grid, stream);
  return launch_tokens<__nv_bfloat16>(p, w, fused_rank, grid, stream);
}

cudaError_t launch_wgrad(const Wgrad& p, Type wide, Type out, cudaStream_t stream) {
  if (wide == Type::float32) return launch_outer<float, float>(p, stream);
  if (wide == Type::float16) {
    return out == Type::float32 ? launch_outer<__half, float>(p, stream)
                                : launch_outer<__half, __half>(p, stream);
  }
  return out == Type::float32 ? launch_outer<__nv_bfloat16, float>(p, stream)
                              : launch_outer<__nv_bfloat16, __nv_bfloat16>(p, stream);
}

}  // namespace lora_kernels
