// y = factor∘(scale·(mask_in∘x)·w + mask_out∘(s·b)) + bias: forward, dx, and the low-rank products
// s and q.
#pragma once

#include <vector>

#include "quantized.h"

namespace lora_kernels {

// Up to so many rows of x read a w that is contiguous in k where it lies.
constexpr int64_t MAX_DOT_ROWS = 16;

struct Product {
  Matrix x;                              // [M, K]
  Matrix w;                              // [K, N]; without data where `quantized` has its elements
  const Matrix* s = nullptr;             // [M, R] float32
  const Matrix* b = nullptr;             // [R, N], one or one a group of rows
  const Matrix* factor = nullptr;        // [1, N] float32, of the columns
  const Matrix* bias = nullptr;          // [1, N], likewise
  const Mask* mask_in = nullptr;         // of x
  const Mask* mask_out = nullptr;        // of s·b
  const Quantized* quantized = nullptr;  // w, or its transpose; the strides of w say which
  float scale = 1.0f;
  void* out = nullptr;     // [M, N], contiguous
  void* before = nullptr;  // [M, N] like out: the results before factor and bias, where not null
  const float* onto = nullptr;  // [M, N], contiguous: what the results are added to; may be out
  int64_t out_pitch = 0;        // elements from row to row of out; 0: out is contiguous
  bool transpose = false;       // out is [N, M] instead
  Type out_type = Type::F32;
  // Groups of rows with a b each, and a bias each where there is one: group g ends before row
  // ends[g]. All rows are one group where it is null.
  const int64_t* ends = nullptr;
};

// s = scale·(mask∘x)·a [M, R]
Product shrink_product(const Matrix& x, const Matrix& a, const Mask* mask, float scale, void* s);

// All of them at once: threads share their tasks.
void compute(const std::vector<Product>& products);

}  // namespace lora_kernels
