// out = (mask∘left)ᵀ·right: the gradients dA = (mask∘x)ᵀ·q and dB = sᵀ·dy.
#pragma once

#include <vector>

#include "kernels.h"

namespace lora_kernels {

// wide [M, W] and lowrank [M, S]; out holds element (s, w) of lowrankᵀ·(mask∘wide) at s·s_stride +
// w·w_stride. Each sum runs over M in order, whatever the blocks and threads.
struct Wgrad {
  Matrix wide, lowrank;
  const Mask* mask;  // of wide, or null
  void* out;
  Type out_type;
  int64_t s_stride, w_stride;
  float* workspace = nullptr;  // of `compute`
};

// out [C, D] = (mask∘left)ᵀ·right for left [M, C] and right [M, D], contiguous.
Wgrad wgrad_of(const Matrix& left, const Matrix& right, const Mask* mask, void* out, Type out_type);

// All of them at once: threads share their tasks.
void compute(std::vector<Wgrad> problems);

}  // namespace lora_kernels
