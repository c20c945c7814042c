// What DoRA adds to a layer's products: the gradient of a scale of columns, and the row norms.
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

// norms = the norms of the rows of w + uᵀ·aᵀ with u = alpha·b, from one reading of w: the root of
// ‖w‖² + Σ_R u∘(2·w·a + aᵀ·a·u), where a sum below zero counts as zero.
struct Norms {
  Matrix w;  // [N, K]
  Matrix a;  // [K, R]
  Matrix b;  // [R, N]
  float alpha;
  float* norms;  // [N]
};

void compute(const Scale& scale);
void compute(const Norms& norms);

}  // namespace lora_kernels
