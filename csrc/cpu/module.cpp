// The operators of lora_kernels/backends/cpu.py: tensors checked and described, then computed.
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <string>

#include "operators.h"
#include "product.h"
#include "scale.h"
#include "wgrad.h"

namespace lora_kernels {
namespace {

// The memory of `t`, which is as `in_memory` gives it, checked to hold everything up to `last`.
const char* memory_of(const Tensor& t, const char* name, int64_t last) {
  const auto* data = static_cast<const char*>(t.const_data_ptr());
  if (t.numel() == 0) return data;
  const int64_t elements = t.storage_offset() + last + 1;
  const auto held = int64_t(t.storage().nbytes());
  TORCH_CHECK(data != nullptr && elements * size_of(type_of(t.scalar_type())) <= held, name,
              " must have memory for ", elements, " elements, its storage holds ", held, " bytes");
  return data;
}

}  // namespace

Stack stack(const Tensor& t, const char* name, int64_t count, int64_t rows, int64_t cols) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 3 && t.size(0) == count && t.size(1) == rows &&
                  t.size(2) == cols,
              name, " must be a [", count, ", ", rows, ", ", cols, "] tensor on the CPU, got ",
              t.sizes(), " on ", t.device());
  const int64_t stride = t.stride(0), row_stride = t.stride(1), col_stride = t.stride(2);
  const int64_t last = (count - 1) * stride + (rows - 1) * row_stride + (cols - 1) * col_stride;
  const char* data = memory_of(t, name, last);
  return {{data, type_of(t.scalar_type()), rows, cols, row_stride, col_stride}, count, stride};
}

Matrix matrix(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name,
              " must be a [", rows, ", ", cols, "] tensor on the CPU, got ", t.sizes(), " on ",
              t.device());
  const int64_t row_stride = t.stride(0), col_stride = t.stride(1);
  const char* data = memory_of(t, name, (rows - 1) * row_stride + (cols - 1) * col_stride);
  return {data, type_of(t.scalar_type()), rows, cols, row_stride, col_stride};
}

void check_usable() { TORCH_CHECK(kernels() != nullptr, "this processor has no AVX2 and FMA"); }

std::optional<Mask> mask_of(int64_t threshold, int64_t seed, double scale, int64_t cols) {
  if (threshold == 0 && scale == 1.0) return std::nullopt;
  TORCH_CHECK(threshold >= 0 && threshold <= UINT32_MAX, "threshold must be a 32-bit word, got ",
              threshold);
  return Mask{uint32_t(threshold), uint64_t(seed), float(scale), cols};
}

namespace {

std::string isa() { return kernels() == nullptr ? "" : kernels()->name; }

bool use_isa(const std::string& name) { return use_kernels(name.c_str()); }

constexpr c10::DispatchKeySet DENSE({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                     c10::DispatchKey::ADInplaceOrView,
                                     c10::DispatchKey::AutocastCPU});
constexpr c10::DispatchKeySet LAZY({c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

}  // namespace

Type type_of(at::ScalarType type) {
  if (type == at::kFloat) return Type::F32;
  if (type == at::kBFloat16) return Type::BF16;
  TORCH_CHECK(type == at::kHalf, "the cpu kernels take float32, bfloat16 and float16, got ", type);
  return Type::F16;
}

bool readable(const Tensor& t) { return within(t.key_set(), DENSE | LAZY); }

c10::MaybeOwned<Tensor> in_memory(const Tensor& t, const char* name, int64_t dims) {
  TORCH_CHECK(dims < 0 || t.dim() == dims, name, " must be ", dims, "-D, got ", t.sizes());
  if (within(t.key_set(), DENSE)) return c10::MaybeOwned<Tensor>::borrowed(t);
  // A key that is switched off has been served: a subclass may hand its own memory on.
  const auto keys = t.key_set() - c10::impl::tls_local_dispatch_key_set().excluded_;
  TORCH_CHECK(within(keys, DENSE | LAZY), name, " must be a dense tensor on the CPU, got one of ",
              t.key_set());
  if (within(keys, DENSE)) return c10::MaybeOwned<Tensor>::borrowed(t);
  return c10::MaybeOwned<Tensor>::owned(t.clone());
}

Tensor shrink(const Tensor& any_x, const Tensor& any_a, double alpha, int64_t threshold,
              int64_t seed, double keep_scale) {
  check_usable();
  const auto x = in_memory(any_x, "x", 2), a = in_memory(any_a, "a", 2);
  const int64_t M = x->size(0), K = x->size(1), R = a->size(1);
  const std::optional<Mask> mask = mask_of(threshold, seed, keep_scale, K);
  Tensor s = at::empty({M, R}, x->options().dtype(at::kFloat));
  const Matrix wide = matrix(*x, "x", M, K), lowrank = matrix(*a, "a", K, R);
  compute({shrink_product(wide, lowrank, mask ? &*mask : nullptr, float(alpha), s.data_ptr())});
  return s;
}

Weight quantised(at::TensorList packed, const std::string& format, at::IntArrayRef sizes) {
  TORCH_CHECK(!packed.empty() && !sizes.empty(), "a quantised weight must have tensors and sizes");
  return {Tensor(), packed.vec(), format, sizes.vec()};
}

Tensor expand(const Tensor& any_x, const Weight& weight, bool transposed, const Tensor& any_s,
              const Tensor& any_b, const std::optional<Tensor>& any_bias, int64_t threshold,
              int64_t seed, double keep_scale, const Tensor* any_factor, Tensor* z) {
  check_usable();
  const auto x = in_memory(any_x, "x", 2), s = in_memory(any_s, "s", 2), b = in_memory(any_b, "b");
  TORCH_CHECK(s->scalar_type() == at::kFloat, "s must be float32, got ", s->scalar_type());
  c10::MaybeOwned<Tensor> dense, bias, factor;
  std::optional<QuantizedTensors> quantized;
  Matrix w;
  if (weight.packed.empty()) {
    dense = in_memory(weight.dense, "w", 2);
    w = transposed ? matrix(*dense, "w", dense->size(0), x->size(1))
                   : matrix(*dense, "w", x->size(1), dense->size(1));
  } else {
    w = quantized.emplace(weight.packed, weight.format, weight.sizes, x->scalar_type()).view();
  }
  if (transposed) w = w.transposed();
  const int64_t M = x->size(0), K = w.rows, N = w.cols, R = s->size(1);
  const std::optional<Mask> mask = mask_of(threshold, seed, keep_scale, N);
  const Matrix tail = matrix(*s, "s", M, R), rows_b = matrix(*b, "b", R, N);
  Tensor y = at::empty({M, N}, x->options());
  Product product{matrix(*x, "x", M, K), w, &tail, &rows_b};
  std::optional<Matrix> row, factors;
  if (any_factor != nullptr) {
    factor = in_memory(*any_factor, "factor", 1);
    TORCH_CHECK(factor->scalar_type() == at::kFloat, "factor must be float32, got ",
                factor->scalar_type());
    factors = matrix(factor->unsqueeze(0), "factor", 1, N);
    product.factor = &*factors;
  }
  if (z != nullptr) {
    *z = at::empty({M, N}, x->options());
    product.before = z->data_ptr();
  }
  if (any_bias) {
    bias = in_memory(*any_bias, "bias", 1);
    row = matrix(bias->unsqueeze(0), "bias", 1, N);
    product.bias = &*row;
  }
  product.mask_out = mask ? &*mask : nullptr;
  product.quantized = quantized ? &quantized->weight : nullptr;
  product.out = y.data_ptr();
  product.out_type = type_of(y.scalar_type());
  compute({product});
  return y;
}

namespace {

// The norms of the rows of w + alpha·(a·b)ᵀ [N], float32
Tensor row_norms(const Tensor& any_w, const Tensor& any_a, const Tensor& any_b, double alpha) {
  check_usable();
  const auto w = in_memory(any_w, "w", 2), a = in_memory(any_a, "a", 2), b = in_memory(any_b, "b");
  const int64_t N = w->size(0), K = w->size(1), R = a->size(1);
  Tensor norms = at::empty({N}, w->options().dtype(at::kFloat));
  compute(Norms{matrix(*w, "w", N, K), matrix(*a, "a", K, R), matrix(*b, "b", R, N), float(alpha),
                norms.mutable_data_ptr<float>()});
  return norms;
}

Tensor expand_dense(const Tensor& x, const Tensor& w, const Tensor& s, const Tensor& b,
                    const std::optional<Tensor>& bias, int64_t threshold, int64_t seed,
                    double keep_scale) {
  return expand(x, {w}, false, s, b, bias, threshold, seed, keep_scale);
}

Tensor expand_quantized(const Tensor& x, at::TensorList packed, const std::string& format,
                        at::IntArrayRef sizes, const Tensor& s, const Tensor& b,
                        const std::optional<Tensor>& bias, int64_t threshold, int64_t seed,
                        double keep_scale) {
  const Weight w = quantised(packed, format, sizes);
  return expand(x, w, false, s, b, bias, threshold, seed, keep_scale);
}

// (y, z) of `expand` with a factor; no z unless it is kept
std::tuple<Tensor, Tensor> expand_by_factor(const Tensor& x, const Weight& w, const Tensor& s,
                                            const Tensor& b, const Tensor& factor,
                                            const std::optional<Tensor>& bias, bool keeps_z) {
  Tensor z = at::empty({0}, x.options());
  Tensor y = expand(x, w, false, s, b, bias, 0, 0, 1.0, &factor, keeps_z ? &z : nullptr);
  return {y, z};
}

std::tuple<Tensor, Tensor> expand_scaled(const Tensor& x, const Tensor& w, const Tensor& s,
                                         const Tensor& b, const Tensor& factor,
                                         const std::optional<Tensor>& bias, bool keeps_z) {
  return expand_by_factor(x, {w}, s, b, factor, bias, keeps_z);
}

std::tuple<Tensor, Tensor> expand_scaled_quantized(const Tensor& x, at::TensorList packed,
                                                   const std::string& format, at::IntArrayRef sizes,
                                                   const Tensor& s, const Tensor& b,
                                                   const Tensor& factor,
                                                   const std::optional<Tensor>& bias,
                                                   bool keeps_z) {
  return expand_by_factor(x, quantised(packed, format, sizes), s, b, factor, bias, keeps_z);
}

}  // namespace

std::tuple<Tensor, Tensor> scaled_gradient(const Tensor& any_dy, const Tensor& any_factor,
                                           const std::optional<Tensor>& any_z) {
  check_usable();
  const auto dy = in_memory(any_dy, "dy", 2), factor = in_memory(any_factor, "factor", 1);
  TORCH_CHECK(factor->scalar_type() == at::kFloat, "factor must be float32, got ",
              factor->scalar_type());
  const int64_t M = dy->size(0), N = dy->size(1);
  Tensor dz = at::empty({M, N}, dy->options());
  Tensor dfactor = at::empty({any_z ? N : 0}, dy->options().dtype(at::kFloat));
  Scale scale{matrix(*dy, "dy", M, N), matrix(factor->unsqueeze(0), "factor", 1, N)};
  c10::MaybeOwned<Tensor> z;
  std::optional<Matrix> results;
  if (any_z) {
    z = in_memory(*any_z, "z");
    results = matrix(*z, "z", M, N);
    scale.z = &*results;
    scale.dfactor = dfactor.mutable_data_ptr<float>();
  }
  scale.dz = dz.data_ptr();
  compute(scale);
  return {dz, dfactor};
}

Tensor wgrad(const Tensor& any_left, const Tensor& any_right, at::ScalarType dtype,
             int64_t threshold, int64_t seed, double keep_scale) {
  check_usable();
  const auto left = in_memory(any_left, "left", 2), right = in_memory(any_right, "right", 2);
  const int64_t M = left->size(0), C = left->size(1), D = right->size(1);
  const std::optional<Mask> mask = mask_of(threshold, seed, keep_scale, C);
  const Matrix rows = matrix(*left, "left", M, C), cols = matrix(*right, "right", M, D);
  Tensor out = at::empty({C, D}, left->options().dtype(dtype));
  compute({wgrad_of(rows, cols, mask ? &*mask : nullptr, out.data_ptr(), type_of(dtype))});
  return out;
}

TORCH_LIBRARY(lora_kernels_cpu, m) {
  m.def(
      "shrink(Tensor x, Tensor a, float alpha, int threshold, int seed, float keep_scale) -> "
      "Tensor");
  m.def(
      "expand(Tensor x, Tensor w, Tensor s, Tensor b, Tensor? bias, int threshold, int seed, "
      "float keep_scale) -> Tensor");
  m.def(
      "expand_quantized(Tensor x, Tensor[] packed, str format, int[] sizes, Tensor s, Tensor b, "
      "Tensor? bias, int threshold, int seed, float keep_scale) -> Tensor");
  m.def(
      "expand_scaled(Tensor x, Tensor w, Tensor s, Tensor b, Tensor factor, Tensor? bias, "
      "bool keeps_z) -> (Tensor, Tensor)");
  m.def(
      "expand_scaled_quantized(Tensor x, Tensor[] packed, str format, int[] sizes, Tensor s, "
      "Tensor b, Tensor factor, Tensor? bias, bool keeps_z) -> (Tensor, Tensor)");
  m.def("scaled_gradient(Tensor dy, Tensor factor, Tensor? z) -> (Tensor, Tensor)");
  m.def("row_norms(Tensor w, Tensor a, Tensor b, float alpha) -> Tensor");
  m.def(
      "wgrad(Tensor left, Tensor right, ScalarType dtype, int threshold, int seed, "
      "float keep_scale) -> Tensor");
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, float alpha, "
      "float dropout_p, int threshold, int seed, Tensor? factor=None) -> Tensor");
  m.def(
      "lora_linear_quantized(Tensor x, Tensor[] packed, str format, int[] sizes, Tensor A, "
      "Tensor B, Tensor? bias, float alpha, float dropout_p, int threshold, int seed, "
      "Tensor? factor=None) -> Tensor");
  m.def(
      "differentiable_backward(Tensor dy, Tensor x, Tensor weight, Tensor A, Tensor B, "
      "Tensor? factor, float alpha, float dropout_p, int seed, bool[] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("dense(Tensor[] packed, str format, int[] sizes, ScalarType dtype) -> Tensor");
  m.def("isa() -> str", &isa);
  m.def("use_isa(str name) -> bool", &use_isa);
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("shrink", &shrink);
  m.impl("expand", &expand_dense);
  m.impl("expand_quantized", &expand_quantized);
  m.impl("expand_scaled", &expand_scaled);
  m.impl("expand_scaled_quantized", &expand_scaled_quantized);
  m.impl("scaled_gradient", &scaled_gradient);
  m.impl("row_norms", &row_norms);
  m.impl("wgrad", &wgrad);
}

}  // namespace lora_kernels
