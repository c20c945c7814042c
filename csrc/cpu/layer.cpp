// The whole layer as one operator with derivatives of its own, for the usual case: a frozen base,
// and A and B trained or not. A small layer's time is that of the calls between its products, so
// these are made here; the formulas are those of lora_kernels/formulas.py.
#include <ATen/ops/_unsafe_view.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "operators.h"

namespace lora_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Dropout {
  double p;
  int64_t threshold, seed;
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

// (y [..., N], s [M, R])
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& A,
                                   const Tensor& B, const std::optional<Tensor>& bias, double alpha,
                                   const Dropout& dropout) {
  TORCH_CHECK(x.dim() > 0 && weight.dim() == 2, "x must have a last dimension, weight two");
  const Tensor rows = rows_of(x);
  Tensor s = shrink(rows, A, alpha, dropout.threshold, dropout.seed, dropout.keep_scale());
  return {shaped_like(expand(rows, weight.t(), s, B, bias, 0, 0, 1.0), x), s};
}

// Autograd sees through plain ATen, and so do function transforms, forward mode and those who count
// or record operators.
bool must_be_transparent(const Tensor& dy) {
  constexpr c10::DispatchKeySet wrapped(
      {c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
       c10::DispatchKey::Python});
  return c10::GradMode::is_enabled() || dy.key_set().has_any(wrapped) ||
         c10::impl::dispatch_mode_enabled() || dy._fw_grad(/*level=*/0).defined();
}

std::tuple<Tensor, Tensor, Tensor> differentiable_backward(const Tensor& dy, const Tensor& x,
                                                           const Tensor& weight, const Tensor& A,
                                                           const Tensor& B, double alpha,
                                                           const Dropout& dropout, bool needs_x) {
  using Signature =
      std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                         const Tensor&, double, double, int64_t, bool);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lora_kernels_cpu::differentiable_backward", "")
                             .typed<Signature>();
  return op.call(dy, x, weight, A, B, alpha, dropout.p, dropout.seed, needs_x);
}

class Layer : public torch::autograd::Function<Layer> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& A, const Tensor& B, const std::optional<Tensor>& bias,
                        double alpha, const Dropout& dropout) {
    auto [y, s] = lora_kernels::forward(x, weight, A, B, bias, alpha, dropout);
    ctx->set_materialize_grads(false);
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["dropout_p"] = dropout.p;
    ctx->saved_data["threshold"] = dropout.threshold;
    ctx->saved_data["seed"] = dropout.seed;
    // x is an operand of dA alone, W of dx alone, s of dB alone; a second derivative of dB reads A.
    const bool adapters = A.requires_grad();
    ctx->save_for_backward({adapters ? x : Tensor(), x.requires_grad() ? weight : Tensor(), A, B,
                            adapters ? s : Tensor()});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list out(7);
    if (!grads[0].defined()) return out;
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &A = saved[2], &B = saved[3], &s = saved[4];
    const double alpha = ctx->saved_data["alpha"].toDouble();
    const Dropout dropout{ctx->saved_data["dropout_p"].toDouble(),
                          ctx->saved_data["threshold"].toInt(), ctx->saved_data["seed"].toInt()};
    // What was asked for now, which may be less than what requires a gradient.
    const bool needs_x = ctx->needs_input_grad(0);
    const bool needs_A = ctx->needs_input_grad(2), needs_B = ctx->needs_input_grad(3);
    if (must_be_transparent(grads[0])) {
      auto [dx, dA, dB] =
          differentiable_backward(grads[0], x, weight, A, B, alpha, dropout, needs_x);
      if (needs_x) out[0] = dx;
      if (needs_A) out[2] = dA;
      if (needs_B) out[3] = dB;
      return out;
    }
    const Tensor dy = rows_of(grads[0].resolve_neg());
    const Tensor q = needs_x || needs_A ? shrink(dy, B.t(), alpha, 0, 0, 1.0) : Tensor();
    if (needs_x)
      out[0] = shaped_like(expand(dy, weight, q, A.t(), std::nullopt, dropout.threshold,
                                  dropout.seed, dropout.keep_scale()),
                           grads[0]);
    if (needs_A)
      out[2] = wgrad(rows_of(x), q, A.scalar_type(), dropout.threshold, dropout.seed,
                     dropout.keep_scale());
    if (needs_B) out[3] = wgrad(s, dy, B.scalar_type(), 0, 0, 1.0);
    return out;
  }
};

// The products read memory as it is: a lazily negated operand must be resolved before.
Tensor lora_linear(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& bias, double alpha, double dropout_p,
                   int64_t threshold, int64_t seed) {
  const auto row = bias ? std::optional<Tensor>(bias->resolve_neg()) : std::nullopt;
  return std::get<0>(forward(x.resolve_neg(), weight.resolve_neg(), A.resolve_neg(),
                             B.resolve_neg(), row, alpha, {dropout_p, threshold, seed}));
}

Tensor lora_linear_autograd(const Tensor& x, const Tensor& weight, const Tensor& A, const Tensor& B,
                            const std::optional<Tensor>& bias, double alpha, double dropout_p,
                            int64_t threshold, int64_t seed) {
  const bool adapters = A.requires_grad() || B.requires_grad();
  const bool base = weight.requires_grad() || (bias && bias->requires_grad());
  if (!c10::GradMode::is_enabled() || !(x.requires_grad() || adapters || base)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return lora_linear(x, weight, A, B, bias, alpha, dropout_p, threshold, seed);
  }
  TORCH_CHECK(!base && A.requires_grad() == B.requires_grad(),
              "this operator's derivatives are those of a frozen weight and bias, and of both or "
              "none of A and B");
  const auto row = bias ? std::optional<Tensor>(bias->resolve_neg()) : std::nullopt;
  return Layer::apply(x.resolve_neg(), weight.resolve_neg(), A.resolve_neg(), B.resolve_neg(), row,
                      alpha, Dropout{dropout_p, threshold, seed});
}

}  // namespace

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) { m.impl("lora_linear", &lora_linear); }

TORCH_LIBRARY_IMPL(lora_kernels_cpu, AutogradCPU, m) {
  m.impl("lora_linear", &lora_linear_autograd);
}

}  // namespace lora_kernels
