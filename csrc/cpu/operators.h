// The three products on tensors, as the operators of the same names compute them; see
// lora_kernels/backends/base.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include <optional>
#include <tuple>

namespace lora_kernels {

using at::Tensor;

// Whether the elements of t are what its memory holds, perhaps negated or all zero. The products
// read memory; other kinds (sparse, functional, batched, a subclass) are for the dispatcher alone.
bool readable(const Tensor& t);

// t with its elements in memory: t itself, a copy of a negated or zero tensor, or an error.
c10::MaybeOwned<Tensor> in_memory(const Tensor& t, const char* name);

// s = alpha·(mask∘x)·a [M, R] float32
Tensor shrink(const Tensor& x, const Tensor& a, double alpha, int64_t threshold, int64_t seed,
              double keep_scale);

// (y, z) = (factor∘z + bias, z), z = x·w + s·b: [M, N]; no z unless it is kept
std::tuple<Tensor, Tensor> scaled_expand(const Tensor& x, const Tensor& w, const Tensor& s,
                                         const Tensor& b, const Tensor& factor,
                                         const std::optional<Tensor>& bias, bool keeps_z);

// (dz, dfactor) = (factor∘dy, the sums of dy∘z over rows); no dfactor without z
std::tuple<Tensor, Tensor> scaled_gradient(const Tensor& dy, const Tensor& factor,
                                           const std::optional<Tensor>& z);

// (w·a [N, R], the sums of w² over columns [N]), float32
std::tuple<Tensor, Tensor> shrink_squares(const Tensor& w, const Tensor& a);

// y = x·w + bias + mask∘(s·b) [M, N]
Tensor expand(const Tensor& x, const Tensor& w, const Tensor& s, const Tensor& b,
              const std::optional<Tensor>& bias, int64_t threshold, int64_t seed,
              double keep_scale);

// (mask∘left)ᵀ·right [C, D]
Tensor wgrad(const Tensor& left, const Tensor& right, at::ScalarType dtype, int64_t threshold,
             int64_t seed, double keep_scale);

}  // namespace lora_kernels
