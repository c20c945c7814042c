// What DoRA adds to a layer's products: the gradient of a scale of columns, and the row norms'
// parts.
#pragma once

#include "kernels.h"

namespace lora_kernels {

// dz = factor∘dy and dfactor = the sums of dy∘z over rows.
struct Scale {
  Matrix dy;                  // [M, N]
  Matrix factor;              // [1, N] float32
  const Matrix* z = nullptr;  // [M, N]; without it no dfactor
  void* dz = nullptr;         // [M, N] of dy's type, contiguous
  float* dfactor = nullptr;   // [N]
};

// lowrank = w·a and squares = the sums of w² over its columns.
struct Norms {
  Matrix w;        // [N, K]
  Matrix a;        // [K, R]
  float* lowrank;  // [N, R]
  float* squares;  // [N]
};

void compute(const Scale& scale);
void compute(const Norms& norms);

}  // namespace lora_kernels
