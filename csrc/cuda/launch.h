// The launchers, free of PyTorch: they pick a kernel by type and size and put it on a stream.
#pragma once

#include <cuda_runtime.h>

namespace lora_kernels {

struct Decode;
struct Wgrad;

enum class Type { float32, float16, bfloat16 };

// Rows of w that one block takes: the unit of `tiles` in Decode::partials and Decode::arrived.
int rows_per_tile(Type w);

// k that a warp takes at once: splits of k begin at its multiples.
int step_of(Type w);

// Ranks that Decode::partials holds beside them: `rank` rounded up if a is multiplied in the same
// pass, else 0.
int ranks_per_tile(int fused_rank);

// w is x's type, or float32 beside a half x. fused_rank: a's rows, at most 32, if s comes out of
// this pass; else 0. grid: blocks, which share the tiles of w, and splits of k.
cudaError_t launch_decode(const Decode& p, Type x, Type w, int fused_rank, dim3 grid,
                          cudaStream_t stream);

// out is wide's type or float32.
cudaError_t launch_wgrad(const Wgrad& p, Type wide, Type out, cudaStream_t stream);

}  // namespace lora_kernels
