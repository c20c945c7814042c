// The three products on tensors, as the operators of the same names compute them; see
// lora_kernels/backends/base.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "quantized.h"

namespace lora_kernels {

using at::Tensor;

// Whether the elements of t are what its memory holds, perhaps negated or all zero. The products
// read memory; other kinds (sparse, functional, batched, a subclass) are for the dispatcher alone.
bool readable(const Tensor& t);

// t with its elements in memory: t itself, a copy of a negated or zero tensor, or an error.
// It has `dims` dimensions, where they are given.
c10::MaybeOwned<Tensor> in_memory(const Tensor& t, const char* name, int64_t dims = -1);

void check_usable();
Type type_of(at::ScalarType type);

// `t`, as `in_memory` gives it, of these sizes.
Matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols);

// The matrices of a [count, rows, cols] tensor; one of count 1 is every group's.
struct Stack {
  Matrix first;
  int64_t count, stride;  // in elements
  Matrix operator[](int64_t g) const {
    Matrix matrix = first;
    if (count > 1) matrix.data += g * stride * size_of(matrix.type);
    return matrix;
  }
};
Stack stack(const Tensor& t, const char* name, int64_t count, int64_t rows, int64_t cols);

// The mask of a [rows, cols] matrix, or nothing when all of it is kept as it is.
std::optional<Mask> mask_of(int64_t threshold, int64_t seed, double scale, int64_t cols);

// A quantised weight over the tensors and sizes that lora_kernels/operands.py has of it. An error
// names what does not fit.
struct QuantizedTensors {
  QuantizedTensors(at::TensorList packed, const std::string& format, at::IntArrayRef sizes,
                   at::ScalarType dtype);
  Matrix view() const;  // the matrix that they stand for, without data

  std::vector<Tensor> tensors;
  Quantized weight{};
  bool transposed = false;
};

// A weight: a tensor, or a quantised one as lora_kernels/operands.py has it.
struct Weight {
  Tensor dense;                // undefined where the weight is quantised
  std::vector<Tensor> packed;  // empty where it is dense
  std::string format;
  std::vector<int64_t> sizes;  // the last one says whether it is transposed
};
Weight quantised(at::TensorList packed, const std::string& format, at::IntArrayRef sizes);

// s = alpha·(mask∘x)·a [M, R] float32
Tensor shrink(const Tensor& x, const Tensor& a, double alpha, int64_t threshold, int64_t seed,
              double keep_scale);

// y = x·w + bias + mask∘(s·b) [M, N], w the weight or its transpose. With a factor
// y = factor∘z + bias, z = x·w + s·b, and z is put where it is asked for.
Tensor expand(const Tensor& x, const Weight& weight, bool transposed, const Tensor& s,
              const Tensor& b, const std::optional<Tensor>& bias, int64_t threshold, int64_t seed,
              double keep_scale, const Tensor* factor = nullptr, Tensor* z = nullptr);

// (dz, dfactor) = (factor∘dy, the sums of dy∘z over rows); no dfactor without z
std::tuple<Tensor, Tensor> scaled_gradient(const Tensor& dy, const Tensor& factor,
                                           const std::optional<Tensor>& z);

// (mask∘left)ᵀ·right [C, D]
Tensor wgrad(const Tensor& left, const Tensor& right, at::ScalarType dtype, int64_t threshold,
             int64_t seed, double keep_scale);

}  // namespace lora_kernels
