// The three products on tensors, as the operators of the same names compute them; see
// lora_kernels/backends/base.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora_kernels {

using at::Tensor;

// s = alpha·(mask∘x)·a [M, R] float32
Tensor shrink(const Tensor& x, const Tensor& a, double alpha, int64_t threshold, int64_t seed,
              double keep_scale);

// y = x·w + bias + mask∘(s·b) [M, N]
Tensor expand(const Tensor& x, const Tensor& w, const Tensor& s, const Tensor& b,
              const std::optional<Tensor>& bias, int64_t threshold, int64_t seed,
              double keep_scale);

// (mask∘left)ᵀ·right [C, D]
Tensor wgrad(const Tensor& left, const Tensor& right, at::ScalarType dtype, int64_t threshold,
             int64_t seed, double keep_scale);

}  // namespace lora_kernels
