// y = factor∘(scale·(mask_in∘x)·w + mask_out∘(s·b)) + bias: forward, dx, and the skinny products s
// and q.
#pragma once

#include "quantized.h"

namespace lora_kernels {

// Up to so many rows of x read a w that is contiguous in k where it lies.
constexpr int64_t MAX_DOT_ROWS = 16;

struct Product {
  Matrix x;                              // [M, K]
  Matrix w;                              // [K, N]; without data where `quantized` has its elements
  const Matrix* s = nullptr;             // [M, R] float32
  const Matrix* b = nullptr;             // [R, N]
  const Matrix* factor = nullptr;        // [1, N] float32, of the columns
  const Matrix* bias = nullptr;          // [1, N]
  const Mask* mask_in = nullptr;         // of x
  const Mask* mask_out = nullptr;        // of s·b
  const Quantized* quantized = nullptr;  // w, or its transpose; the strides of w say which
  float scale = 1.0f;
  void* out = nullptr;     // [M, N], contiguous
  void* before = nullptr;  // [M, N] like out: the results before factor and bias, where not null
  bool transpose = false;  // out is [N, M] instead
  Type out_type = Type::F32;
};

void compute(const Product& product);

}  // namespace lora_kernels
