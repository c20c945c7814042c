// y = scale·(mask_in∘x)·w + mask_out∘(s·b) + bias: forward, dx, and the skinny products s and q.
#pragma once

#include "kernels.h"

namespace lora_kernels {

// Up to so many rows of x read a w that is contiguous in k where it lies.
constexpr int64_t MAX_DOT_ROWS = 16;

struct Product {
  Matrix x;                        // [M, K]
  Matrix w;                        // [K, N]
  const Matrix* s = nullptr;       // [M, R] float32
  const Matrix* b = nullptr;       // [R, N]
  const Matrix* bias = nullptr;    // [1, N]
  const Mask* mask_in = nullptr;   // of x
  const Mask* mask_out = nullptr;  // of s·b
  float scale = 1.0f;
  void* out = nullptr;     // [M, N], contiguous
  bool transpose = false;  // out is [N, M] instead
  Type out_type = Type::F32;
};

void compute(const Product& product);
// Several products at once: the threads share the tasks of all of them.
void compute(const Product* products, int64_t count);

}  // namespace lora_kernels
