// The whole layer as one operator with derivatives of its own, for the usual case: a frozen base,
// and A and B trained or not. A small layer's time is that of the calls between its products, so
// these are made here; the formulas are those of lora_kernels/formulas.py.
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "operators.h"

namespace lora_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Dropout {
  double p = 0.0;
  int64_t threshold = 0, seed = 0;
  double keep_scale() const { return 1.0 / (1.0 - p); }
};

Tensor rows_of(const Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t cols = t.size(-1);
  return t.reshape({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), cols});
}

// Rows as the last dimension of `like`'s others. Not a view for autograd: what a Function returns
// as one could not be changed in place.
Tensor shaped_like(const Tensor& rows, const Tensor& like) {
  if (like.dim() == 2) return rows;
  at::DimVector sizes(like.sizes());
  sizes.back() = rows.size(1);
  return at::_unsafe_view(rows, sizes);
}

// A frozen weight [N, K]: a tensor, or a quantised one as lora_kernels/operands.py has it.
struct Weight {
  Tensor dense;                // undefined where the weight is quantised
  std::vector<Tensor> packed;  // empty where it is dense
  std::string format;
  std::vector<int64_t> sizes;  // the last one says whether it is transposed
};

// x·weightᵀ, or without `transposed` x·weight, + bias + mask∘(s·b)
Tensor expand_by_weight(const Tensor& x, const Weight& weight, bool transposed, const Tensor& s,
                        const Tensor& b, const std::optional<Tensor>& bias,
                        const Dropout& dropout) {
  const int64_t threshold = dropout.threshold, seed = dropout.seed;
  const double keep_scale = dropout.keep_scale();
  if (weight.packed.empty()) {
    const auto dense = in_memory(weight.dense, "weight");
    TORCH_CHECK(dense->dim() == 2, "weight must have two dimensions");
    const Tensor w = transposed ? dense->t() : *dense;
    return expand(x, w, s, b, bias, threshold, seed, keep_scale);
  }
  std::vector<int64_t> sizes = weight.sizes;
  sizes.back() = (sizes.back() != 0) != transposed;
  return expand_quantized(x, weight.packed, weight.format, sizes, s, b, bias, threshold, seed,
                          keep_scale);
}

// (y [..., N], s [M, R])
std::tuple<Tensor, Tensor> forward(const Tensor& any_x, const Weight& weight, const Tensor& any_A,
                                   const Tensor& any_B, const std::optional<Tensor>& bias,
                                   double alpha, const Dropout& dropout) {
  const auto x = in_memory(any_x, "x"), A = in_memory(any_A, "A"), B = in_memory(any_B, "B");
  TORCH_CHECK(x->dim() > 0, "x must have a last dimension");
  const Tensor rows = rows_of(*x);
  Tensor s = shrink(rows, *A, alpha, dropout.threshold, dropout.seed, dropout.keep_scale());
  const Tensor y = expand_by_weight(rows, weight, true, s, *B, bias, Dropout{});
  return {shaped_like(y, *x), s};
}

// Autograd can differentiate plain ATen, and so can function transforms, forward mode, those who
// count or record operators, and every kind of tensor that cannot be read here.
bool must_be_transparent(const Tensor& dy, const variable_list& saved) {
  const auto kept = [](const Tensor& t) { return !t.defined() || readable(t); };
  return c10::GradMode::is_enabled() || !readable(dy) || c10::impl::dispatch_mode_enabled() ||
         dy._fw_grad(/*level=*/0).defined() || !std::all_of(saved.begin(), saved.end(), kept);
}

// The operators of lora_kernels/backends/cpu.py that are written in Python.
template <class Signature>
auto in_python(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor dense(const Weight& weight, at::ScalarType dtype) {
  if (weight.packed.empty()) return weight.dense;
  using Signature = Tensor(at::TensorList, c10::string_view, at::IntArrayRef, at::ScalarType);
  static const auto op = in_python<Signature>("lora_kernels_cpu::dense");
  return op.call(weight.packed, weight.format, weight.sizes, dtype);
}

std::tuple<Tensor, Tensor, Tensor> differentiable_backward(const Tensor& dy, const Tensor& x,
                                                           const Tensor& weight, const Tensor& A,
                                                           const Tensor& B, double alpha,
                                                           const Dropout& dropout, bool needs_x) {
  using Signature =
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, double, double, int64_t, bool);
  static const auto op = in_python<Signature>("lora_kernels_cpu::differentiable_backward");
  return op.call(dy, x, weight, A, B, alpha, dropout.p, dropout.seed, needs_x);
}

class Layer : public torch::autograd::Function<Layer> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Weight& weight,
                        const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias,
                        double alpha, const Dropout& dropout) {
    auto [y, s] = lora_kernels::forward(x, weight, A, B, bias, alpha, dropout);
    ctx->set_materialize_grads(false);
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dropout_p"] = dropout.p;
    ctx->saved_data["threshold"] = dropout.threshold;
    ctx->saved_data["seed"] = dropout.seed;
    // x is an operand of dA alone, W of dx alone, s of dB alone; a second derivative of dB reads A.
    const bool adapters = A.requires_grad(), needs_x = x.requires_grad();
    variable_list kept{adapters ? x : Tensor(), A, B, adapters ? s : Tensor(),
                       needs_x ? weight.dense : Tensor()};
    if (needs_x) kept.insert(kept.end(), weight.packed.begin(), weight.packed.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["format"] = weight.format;
    ctx->saved_data["sizes"] = weight.sizes;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(7);
    if (!grads[0].defined()) return out;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &A = saved[1], &B = saved[2], &s = saved[3];
    const Weight weight{saved[4],
                        {saved.begin() + 5, saved.end()},
                        ctx->saved_data["format"].toStringRef(),
                        ctx->saved_data["sizes"].toIntVector()};
    const double alpha = ctx->saved_data["alpha"].toDouble();
    const Dropout dropout{ctx->saved_data["dropout_p"].toDouble(),
                          ctx->saved_data["threshold"].toInt(), ctx->saved_data["seed"].toInt()};
    // What was asked for now, which may be less than what requires a gradient.
    const bool needs_x = ctx->needs_input_grad(0);
    const bool needs_A = ctx->needs_input_grad(1), needs_B = ctx->needs_input_grad(2);
    // A gather with sparse_grad gives a sparse gradient.
    const Tensor grad = grads[0].is_sparse() ? grads[0].to_dense() : grads[0];
    if (must_be_transparent(grad, saved)) {
      const Tensor w = dense(weight, grad.scalar_type());
      auto [dx, dA, dB] = differentiable_backward(grad, x, w, A, B, alpha, dropout, needs_x);
      if (needs_x) out[0] = dx;
      if (needs_A) out[2] = dA;
      if (needs_B) out[3] = dB;
      return out;
    }
    const Tensor dy = rows_of(*in_memory(grad, "dy"));
    const Tensor q = needs_x || needs_A ? shrink(dy, B.t(), alpha, 0, 0, 1.0) : Tensor();
    if (needs_x)
      out[0] =
          shaped_like(expand_by_weight(dy, weight, false, q, A.t(), std::nullopt, dropout), grad);
    if (needs_A)
      out[2] = wgrad(rows_of(x), q, A.scalar_type(), dropout.threshold, dropout.seed,
                     dropout.keep_scale());
    if (needs_B) out[3] = wgrad(s, dy, B.scalar_type(), 0, 0, 1.0);
    return out;
  }
};

Tensor with_derivatives(const Tensor& x, const Weight& weight, const Tensor& A, const Tensor& B,
                        const std::optional<Tensor>& bias, double alpha, const Dropout& dropout) {
  const bool adapters = A.requires_grad() || B.requires_grad();
  const bool base =
      (weight.dense.defined() && weight.dense.requires_grad()) || (bias && bias->requires_grad());
  if (!c10::GradMode::is_enabled() || !(x.requires_grad() || adapters || base)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return std::get<0>(forward(x, weight, A, B, bias, alpha, dropout));
  }
  TORCH_CHECK(!base && A.requires_grad() == B.requires_grad(),
              "this operator's derivatives are those of a frozen weight and bias, and of both or "
              "none of A and B");
  return Layer::apply(x, weight, A, B, bias, alpha, dropout);
}

Weight quantised(at::TensorList packed, const std::string& format, at::IntArrayRef sizes) {
  TORCH_CHECK(!packed.empty() && !sizes.empty(), "a quantised weight must have tensors and sizes");
  return {Tensor(), packed.vec(), format, sizes.vec()};
}

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& bias, double alpha, double dropout_p,
                   int64_t threshold, int64_t seed) {
  return std::get<0>(forward(x, {weight}, A, B, bias, alpha, {dropout_p, threshold, seed}));
}

Tensor lora_linear_autograd(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                            const std::optional<Tensor>& bias, double alpha, double dropout_p,
                            int64_t threshold, int64_t seed) {
  return with_derivatives(x, {weight}, A, B, bias, alpha, {dropout_p, threshold, seed});
}

Tensor lora_linear_quantized(const Tensor& x, at::TensorList packed, const std::string& format,
                             at::IntArrayRef sizes, const Tensor& A, const Tensor& B,
                             const std::optional<Tensor>& bias, double alpha, double dropout_p,
                             int64_t threshold, int64_t seed) {
  const Weight weight = quantised(packed, format, sizes);
  return std::get<0>(forward(x, weight, A, B, bias, alpha, {dropout_p, threshold, seed}));
}

Tensor lora_linear_quantized_autograd(const Tensor& x, at::TensorList packed,
                                      const std::string& format, at::IntArrayRef sizes,
                                      const Tensor& A, const Tensor& B,
                                      const std::optional<Tensor>& bias, double alpha,
                                      double dropout_p, int64_t threshold, int64_t seed) {
  const Weight weight = quantised(packed, format, sizes);
  return with_derivatives(x, weight, A, B, bias, alpha, {dropout_p, threshold, seed});
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("lora_linear", &lora_linear);
  m.impl("lora_linear_quantized", &lora_linear_quantized);
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, AutogradCPU, m) {
  m.impl("lora_linear", &lora_linear_autograd);
  m.impl("lora_linear_quantized", &lora_linear_quantized_autograd);
}

}  // namespace lora_kernels
