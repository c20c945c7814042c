// The whole layer as one operator with derivatives of its own, for the usual case: a frozen base,
// and A and B trained or not; with DoRA's factor of the columns, trained or not. A small layer's
// time is that of the calls between its products, so these are made here; the formulas are those of
// lora_kernels/formulas.py.
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

struct Results {
  Tensor y, s, z;  // [..., N], [M, R], [M, N]; z, y before the factor, only where it is kept
};

Results forward(const Tensor& any_x, const Weight& weight, const Tensor& any_A, const Tensor& any_B,
                const std::optional<Tensor>& bias, double alpha, const Dropout& dropout,
                const std::optional<Tensor>& factor, bool keeps_z) {
  const auto x = in_memory(any_x, "x"), A = in_memory(any_A, "A"), B = in_memory(any_B, "B");
  TORCH_CHECK(x->dim() > 0, "x must have a last dimension");
  TORCH_CHECK(!factor || dropout.threshold == 0, "a factor must come without dropout");
  const Tensor rows = rows_of(*x);
  Tensor s = shrink(rows, *A, alpha, dropout.threshold, dropout.seed, dropout.keep_scale());
  Tensor z;
  const Tensor y = expand(rows, weight, true, s, *B, bias, 0, 0, 1.0, factor ? &*factor : nullptr,
                          keeps_z ? &z : nullptr);
  return {shaped_like(y, *x), s, z};
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

// dy, x, weight, A, B, factor, alpha, dropout_p, seed, needs -> the gradients of x, A, B and the
// factor
using DifferentiableBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const std::optional<Tensor>&, double, double, int64_t, at::ArrayRef<bool>);

class Layer : public torch::autograd::Function<Layer> {
 public:
  enum Input { X, WEIGHT, A_, B_, FACTOR, BIAS, ALPHA, DROPOUT, INPUTS };
  // The places of those that are tensors and always given; autograd counts no others before them.
  enum Variable { X_VARIABLE, A_VARIABLE, B_VARIABLE, FACTOR_VARIABLE };

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Weight& weight,
                        const Tensor& A, const Tensor& B, const std::optional<Tensor>& factor,
                        const std::optional<Tensor>& bias, double alpha, const Dropout& dropout) {
    const bool adapters = A.requires_grad(), scaled = factor && factor->requires_grad();
    auto [y, s, z] =
        lora_kernels::forward(x, weight, A, B, bias, alpha, dropout, factor, /*keeps_z=*/scaled);
    ctx->set_materialize_grads(false);
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dropout_p"] = dropout.p;
    ctx->saved_data["threshold"] = dropout.threshold;
    ctx->saved_data["seed"] = dropout.seed;
    // x is an operand of dA alone, W of dx alone, s of dB alone, z of the factor's gradient alone;
    // a second derivative of dB reads A, one of the factor's x and W.
    const bool needs_w = x.requires_grad() || scaled;
    variable_list kept{adapters || scaled ? x : Tensor(),
                       A,
                       B,
                       adapters ? s : Tensor(),
                       factor.value_or(Tensor()),
                       z,
                       needs_w ? weight.dense : Tensor()};
    if (needs_w) kept.insert(kept.end(), weight.packed.begin(), weight.packed.end());
    ctx->save_for_backward(std::move(kept));
    if (!weight.packed.empty()) {
      ctx->saved_data["format"] = weight.format;
      ctx->saved_data["sizes"] = weight.sizes;
    }
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(INPUTS);
    if (!grads[0].defined()) return out;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &A = saved[1], &B = saved[2], &s = saved[3], &factor = saved[4],
                 &z = saved[5];
    Weight weight{saved[6], {saved.begin() + 7, saved.end()}, {}, {}};
    if (!weight.packed.empty()) {
      weight.format = ctx->saved_data["format"].toStringRef();
      weight.sizes = ctx->saved_data["sizes"].toIntVector();
    }
    const double alpha = ctx->saved_data["alpha"].toDouble();
    const Dropout dropout{ctx->saved_data["dropout_p"].toDouble(),
                          ctx->saved_data["threshold"].toInt(), ctx->saved_data["seed"].toInt()};
    // What was asked for now, which may be less than what requires a gradient.
    const bool needs_x = ctx->needs_input_grad(X_VARIABLE);
    const bool needs_A = ctx->needs_input_grad(A_VARIABLE);
    const bool needs_B = ctx->needs_input_grad(B_VARIABLE);
    const bool needs_factor = factor.defined() && ctx->needs_input_grad(FACTOR_VARIABLE);
    // A gather with sparse_grad gives a sparse gradient.
    const Tensor grad = grads[0].is_sparse() ? grads[0].to_dense() : grads[0];
    if (must_be_transparent(grad, saved)) {
      const bool reads_w = needs_x || needs_factor;
      static const auto op =
          in_python<DifferentiableBackward>("lora_kernels_cpu::differentiable_backward");
      auto [dx, dA, dB, dc] =
          op.call(grad, x, reads_w ? dense(weight, grad.scalar_type()) : Tensor(), A, B,
                  factor.defined() ? std::optional(factor) : std::nullopt, alpha, dropout.p,
                  dropout.seed, {needs_x, needs_A, needs_B, needs_factor});
      if (needs_x) out[X] = dx;
      if (needs_A) out[A_] = dA;
      if (needs_B) out[B_] = dB;
      if (needs_factor) out[FACTOR] = dc;
      return out;
    }
    const Tensor dy = rows_of(*in_memory(grad, "dy"));
    Tensor dz = dy, scaled_B = B;
    if (factor.defined()) {
      if (needs_x || needs_factor)
        std::tie(dz, out[FACTOR]) =
            scaled_gradient(dy, factor, needs_factor ? std::optional(z) : std::nullopt);
      if (!needs_factor) out[FACTOR] = Tensor();
      scaled_B = B.mul(factor).to(B.scalar_type());
    }
    const Tensor q = needs_x || needs_A ? shrink(dy, scaled_B.t(), alpha, 0, 0, 1.0) : Tensor();
    if (needs_x)
      out[X] = shaped_like(expand(dz, weight, false, q, A.t(), std::nullopt, dropout.threshold,
                                  dropout.seed, dropout.keep_scale()),
                           grad);
    if (needs_A)
      out[A_] = wgrad(rows_of(x), q, A.scalar_type(), dropout.threshold, dropout.seed,
                      dropout.keep_scale());
    if (needs_B) {
      out[B_] = wgrad(s, dy, B.scalar_type(), 0, 0, 1.0);
      if (factor.defined()) out[B_] = out[B_].mul(factor).to(B.scalar_type());
    }
    return out;
  }
};

Tensor without_derivatives(const Tensor& x, const Weight& weight, const Tensor& A, const Tensor& B,
                           const std::optional<Tensor>& bias, double alpha, const Dropout& dropout,
                           const std::optional<Tensor>& factor) {
  return forward(x, weight, A, B, bias, alpha, dropout, factor, false).y;
}

Tensor with_derivatives(const Tensor& x, const Weight& weight, const Tensor& A, const Tensor& B,
                        const std::optional<Tensor>& bias, double alpha, const Dropout& dropout,
                        const std::optional<Tensor>& factor) {
  const bool adapters = A.requires_grad() || B.requires_grad();
  const bool base =
      (weight.dense.defined() && weight.dense.requires_grad()) || (bias && bias->requires_grad());
  const bool scaled = factor && factor->requires_grad();
  if (!c10::GradMode::is_enabled() || !(x.requires_grad() || adapters || base || scaled)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return without_derivatives(x, weight, A, B, bias, alpha, dropout, factor);
  }
  TORCH_CHECK(!base && A.requires_grad() == B.requires_grad(),
              "this operator's derivatives are those of a frozen weight and bias, and of both or "
              "none of A and B");
  return Layer::apply(x, weight, A, B, factor, bias, alpha, dropout);
}

template <auto& run>
Tensor lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& bias, double alpha, double dropout_p,
                   int64_t threshold, int64_t seed, const std::optional<Tensor>& factor) {
  return run(x, {weight}, A, B, bias, alpha, {dropout_p, threshold, seed}, factor);
}

template <auto& run>
Tensor lora_linear_quantized(const Tensor& x, at::TensorList packed, const std::string& format,
                             at::IntArrayRef sizes, const Tensor& A, const Tensor& B,
                             const std::optional<Tensor>& bias, double alpha, double dropout_p,
                             int64_t threshold, int64_t seed, const std::optional<Tensor>& factor) {
  const Weight weight = quantised(packed, format, sizes);
  return run(x, weight, A, B, bias, alpha, {dropout_p, threshold, seed}, factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("lora_linear", &lora_linear<without_derivatives>);
  m.impl("lora_linear_quantized", &lora_linear_quantized<without_derivatives>);
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, AutogradCPU, m) {
  m.impl("lora_linear", &lora_linear<with_derivatives>);
  m.impl("lora_linear_quantized", &lora_linear_quantized<with_derivatives>);
}

}  // namespace lora_kernels
