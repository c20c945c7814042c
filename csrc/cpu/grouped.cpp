// The products over groups of rows, as the operators of lora_kernels/backends/cpu.py compute them:
// each group is a product of its own, and the threads share the tasks of all groups.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "operators.h"
#include "product.h"
#include "wgrad.h"

namespace lora_kernels {
namespace {

// Groups of T rows: offsets[g] up to offsets[g + 1]. Every offset was checked.
struct Groups {
  std::vector<int64_t> offsets;

  Groups(const Tensor& any_offsets, int64_t rows) {
    const auto tensor = in_memory(any_offsets, "offsets");
    TORCH_CHECK(tensor->scalar_type() == at::kInt && tensor->dim() == 1 && tensor->size(0) > 1,
                "offsets must be int32 [G + 1] on the CPU, got ", tensor->scalar_type(), " ",
                tensor->sizes());
    const Tensor whole = tensor->contiguous();
    const int32_t* data = whole.const_data_ptr<int32_t>();
    offsets.assign(data, data + whole.size(0));
    TORCH_CHECK_VALUE(offsets[0] == 0, "offsets must begin with 0, got ", offsets[0]);
    for (int64_t g = 0; g < count(); ++g)
      TORCH_CHECK_VALUE(begin(g) <= end(g), "offsets must not fall, got ", begin(g), " before ",
                        end(g), " at ", g);
    TORCH_CHECK_VALUE(offsets.back() == rows, "offsets must end at T = ", rows,
                      ", the rows of x, got ", offsets.back());
  }
  int64_t count() const { return int64_t(offsets.size()) - 1; }
  int64_t begin(int64_t g) const { return offsets[g]; }
  int64_t end(int64_t g) const { return offsets[g + 1]; }
  int64_t rows(int64_t g) const { return end(g) - begin(g); }
};

// The mask of each group's rows; empty where everything is kept.
std::vector<Mask> masks_of(const Groups& groups, const std::optional<Mask>& whole) {
  std::vector<Mask> masks;
  if (!whole) return masks;
  masks.assign(groups.count(), *whole);
  for (int64_t g = 0; g < groups.count(); ++g) masks[g].row = groups.begin(g);
  return masks;
}

// y of each group's rows: by a w of its own, or by one of count 1, whose elements may be in
// `quantized`.
Tensor expand_groups(const Tensor& x, const Stack& w, const Quantized* quantized,
                     const Tensor& any_s, const Tensor& any_b,
                     const std::optional<Tensor>& any_bias, const Groups& groups, bool shared,
                     int64_t threshold, int64_t seed, double keep_scale) {
  const auto s = in_memory(any_s, "s", 2), b = in_memory(any_b, "b");
  TORCH_CHECK(s->scalar_type() == at::kFloat, "s must be float32, got ", s->scalar_type());
  const int64_t T = x.size(0), K = w.first.rows, N = w.first.cols, R = s->size(1);
  const int64_t G = groups.count();
  const Matrix rows = matrix(x, "x", T, K), tail = matrix(*s, "s", T, R);
  const Stack stack_b = stack(*b, "b", G, R, N);
  c10::MaybeOwned<Tensor> bias;
  Stack biases{};
  if (any_bias) {
    bias = in_memory(*any_bias, "bias");
    TORCH_CHECK(bias->dim() == 1 || bias->dim() == 2, "bias must be 1-D or 2-D");
    const bool one = bias->dim() == 1;
    biases = stack(one ? bias->view({1, 1, -1}) : bias->unsqueeze(1), "bias", one ? 1 : G, 1, N);
  }
  const std::optional<Mask> mask = mask_of(threshold, seed, keep_scale, N);
  const auto masks = masks_of(groups, mask);
  Tensor y = at::empty({T, N}, x.options());
  std::vector<Matrix> parts, each_b, each_bias;  // what the products point to
  for (int64_t g = 0; g < G; ++g) {
    parts.push_back(tail.part(groups.begin(g), groups.rows(g)));
    each_b.push_back(stack_b[g]);
    if (any_bias) each_bias.push_back(biases[g]);
  }
  Product whole{rows, w.first, &tail, each_b.data()};
  whole.out_type = type_of(y.scalar_type());
  whole.out = y.data_ptr();
  whole.bias = any_bias ? each_bias.data() : nullptr;
  whole.mask_out = mask ? &*mask : nullptr;
  whole.quantized = quantized;
  if (shared) {  // one product, whose rows have the b of their group
    whole.ends = groups.offsets.data() + 1;
    compute({whole});
    return y;
  }
  std::vector<Product> products;
  products.reserve(G);
  for (int64_t g = 0; g < G; ++g) {
    if (groups.rows(g) == 0) continue;
    Product& own = products.emplace_back(whole);
    own.x = rows.part(groups.begin(g), groups.rows(g));
    own.w = w[g];
    own.s = &parts[g];
    own.b = &each_b[g];
    if (any_bias) own.bias = &each_bias[g];
    if (mask) own.mask_out = &masks[g];
    own.out = static_cast<char*>(whole.out) + groups.begin(g) * N * size_of(whole.out_type);
  }
  compute(products);
  return y;
}

}  // namespace

Tensor grouped_shrink(const Tensor& any_x, const Tensor& any_a, const Tensor& offsets,
                      at::ArrayRef<double> scale, int64_t threshold, int64_t seed,
                      double keep_scale) {
  check_usable();
  const auto x = in_memory(any_x, "x", 2), a = in_memory(any_a, "a", 3);
  const int64_t T = x->size(0), K = x->size(1), R = a->size(2);
  const Groups groups(offsets, T);
  const int64_t G = groups.count();
  TORCH_CHECK(scale.size() == 1 || int64_t(scale.size()) == G, "scale must be one or ", G,
              " numbers, got ", scale.size());
  const Matrix rows = matrix(*x, "x", T, K);
  const Stack lowrank = stack(*a, "a", G, K, R);
  const auto masks = masks_of(groups, mask_of(threshold, seed, keep_scale, K));
  Tensor s = at::empty({T, R}, x->options().dtype(at::kFloat));
  float* out = s.mutable_data_ptr<float>();
  std::vector<Product> products;
  products.reserve(G);
  for (int64_t g = 0; g < G; ++g) {
    if (groups.rows(g) == 0) continue;
    products.push_back(shrink_product(
        rows.part(groups.begin(g), groups.rows(g)), lowrank[g], masks.empty() ? nullptr : &masks[g],
        float(scale[scale.size() == 1 ? 0 : g]), out + groups.begin(g) * R));
  }
  compute(products);
  return s;
}

Tensor grouped_expand(const Tensor& any_x, const Tensor& any_w, const Tensor& s, const Tensor& b,
                      const std::optional<Tensor>& bias, const Tensor& offsets, int64_t threshold,
                      int64_t seed, double keep_scale) {
  check_usable();
  const auto x = in_memory(any_x, "x", 2), w = in_memory(any_w, "w");
  TORCH_CHECK(w->dim() == 2 || w->dim() == 3, "w must be 2-D or 3-D, got ", w->sizes());
  const Groups groups(offsets, x->size(0));
  const bool shared = w->dim() == 2;
  const Stack weights = stack(shared ? w->unsqueeze(0) : *w, "w", shared ? 1 : groups.count(),
                              x->size(1), w->size(-1));
  return expand_groups(*x, weights, nullptr, s, b, bias, groups, shared, threshold, seed,
                       keep_scale);
}

Tensor grouped_expand_quantized(const Tensor& any_x, at::TensorList packed,
                                const std::string& format, at::IntArrayRef sizes, const Tensor& s,
                                const Tensor& b, const std::optional<Tensor>& bias,
                                const Tensor& offsets, int64_t threshold, int64_t seed,
                                double keep_scale) {
  check_usable();
  const auto x = in_memory(any_x, "x", 2);
  const QuantizedTensors w(packed, format, sizes, x->scalar_type());
  return expand_groups(*x, Stack{w.view(), 1, 0}, &w.weight, s, b, bias,
                       Groups(offsets, x->size(0)), true, threshold, seed, keep_scale);
}

Tensor grouped_wgrad(const Tensor& any_left, const Tensor& any_right, const Tensor& offsets,
                     at::ScalarType dtype, int64_t threshold, int64_t seed, double keep_scale) {
  check_usable();
  const auto left = in_memory(any_left, "left", 2), right = in_memory(any_right, "right", 2);
  const int64_t T = left->size(0), C = left->size(1), D = right->size(1);
  const Groups groups(offsets, T);
  const int64_t G = groups.count();
  const auto masks = masks_of(groups, mask_of(threshold, seed, keep_scale, C));
  const Matrix all_left = matrix(*left, "left", T, C), all_right = matrix(*right, "right", T, D);
  Tensor out = at::empty({G, C, D}, left->options().dtype(dtype));
  const Type type = type_of(dtype);
  std::vector<Wgrad> problems;
  problems.reserve(G);
  for (int64_t g = 0; g < G; ++g) {  // a group without rows too: its sums are zero
    const int64_t begin = groups.begin(g), rows = groups.rows(g);
    problems.push_back(wgrad_of(all_left.part(begin, rows), all_right.part(begin, rows),
                                masks.empty() ? nullptr : &masks[g],
                                static_cast<char*>(out.data_ptr()) + g * C * D * size_of(type),
                                type));
  }
  compute(std::move(problems));
  return out;
}

// dyᵀ·x of each group [G, N, K], both of full width.
Tensor grouped_weight_grad(const Tensor& any_dy, const Tensor& any_x, const Tensor& offsets) {
  check_usable();
  const auto dy = in_memory(any_dy, "dy", 2), x = in_memory(any_x, "x", 2);
  const int64_t T = dy->size(0), N = dy->size(1), K = x->size(1);
  const Groups groups(offsets, T);
  const Matrix left = matrix(*dy, "dy", T, N), right = matrix(*x, "x", T, K);
  Tensor out = at::empty({groups.count(), N, K}, x->options());
  std::vector<Product> products;
  products.reserve(groups.count());
  for (int64_t g = 0; g < groups.count(); ++g) {
    const int64_t begin = groups.begin(g), rows = groups.rows(g);
    Product& product = products.emplace_back(
        Product{left.part(begin, rows).transposed(), right.part(begin, rows)});
    product.out_type = type_of(out.scalar_type());
    product.out = static_cast<char*>(out.data_ptr()) + g * N * K * size_of(product.out_type);
  }
  compute(products);
  return out;
}

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  m.def(
      "grouped_shrink(Tensor x, Tensor a, Tensor offsets, float[] scale, int threshold, int seed, "
      "float keep_scale) -> Tensor");
  m.def(
      "grouped_expand(Tensor x, Tensor w, Tensor s, Tensor b, Tensor? bias, Tensor offsets, "
      "int threshold, int seed, float keep_scale) -> Tensor");
  m.def(
      "grouped_expand_quantized(Tensor x, Tensor[] packed, str format, int[] sizes, Tensor s, "
      "Tensor b, Tensor? bias, Tensor offsets, int threshold, int seed, float keep_scale) -> "
      "Tensor");
  m.def(
      "grouped_wgrad(Tensor left, Tensor right, Tensor offsets, ScalarType dtype, int threshold, "
      "int seed, float keep_scale) -> Tensor");
  m.def("grouped_weight_grad(Tensor dy, Tensor x, Tensor offsets) -> Tensor");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("grouped_shrink", &grouped_shrink);
  m.impl("grouped_expand", &grouped_expand);
  m.impl("grouped_expand_quantized", &grouped_expand_quantized);
  m.impl("grouped_wgrad", &grouped_wgrad);
  m.impl("grouped_weight_grad", &grouped_weight_grad);
}

}  // namespace lora_kernels
