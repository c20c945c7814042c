// The products of several projections that read one x, as the operators of
// lora_kernels/backends/cpu.py compute them: one parallel region for all of them, and one sum for
// dx. Every list has an element for each projection; s and q lie side by side in one tensor.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "operators.h"
#include "product.h"
#include "wgrad.h"

namespace lora_kernels {
namespace {

// From so many rows and ranks on one shrink by all A side by side is faster: at 512 rows of 2048
// and three ranks of 16 float32 726 us against 842, of 32 1308 against 1393, but of 8 531 against
// 480 (AMD Zen 3, 2 threads, 2026-11).
constexpr int64_t ROWS_BESIDE = 512, MEAN_RANK_BESIDE = 9;
// Likewise all dA in one reduction, by elements of x: 2^20 and ranks of 8 980 us against 1165, but
// 364 against 292 at 512 rows of 768.
constexpr int64_t X_BESIDE = 1 << 20;

// Tensors that can be read, and the columns of s [M, ΣR] that are each projection's.
struct List {
  std::vector<c10::MaybeOwned<Tensor>> tensors;

  List(at::TensorList any, const char* name) {
    TORCH_CHECK(!any.empty(), name, " must not be empty");
    for (const Tensor& t : any) tensors.push_back(in_memory(t, name, 2));
  }
  int64_t count() const { return int64_t(tensors.size()); }
  // An error unless there is one for each of P projections, or, where they may share it, one.
  void check(const char* name, int64_t P, bool may_be_shared = false) const {
    TORCH_CHECK(count() == P || (may_be_shared && count() == 1), name, " must have ", P,
                " tensors, got ", count());
  }
  // The one that all share where there is only one.
  const Tensor& operator[](int64_t p) const { return *tensors[count() == 1 ? 0 : p]; }
  Tensor beside() const {
    std::vector<Tensor> all;
    for (const auto& t : tensors) all.push_back(*t);
    return at::cat(all, 1);
  }
  int64_t cols() const {
    int64_t total = 0;
    for (const auto& t : tensors) total += t->size(1);
    return total;
  }
};

// The dropout masks of one operand of each projection; none where the lists are empty.
struct Masks {
  std::vector<std::optional<Mask>> masks;

  Masks(int64_t count, at::IntArrayRef threshold, at::IntArrayRef seed, at::ArrayRef<double> scale,
        int64_t cols) {
    TORCH_CHECK(threshold.size() == seed.size() && threshold.size() == scale.size() &&
                    (threshold.empty() || int64_t(threshold.size()) == count),
                "threshold, seed and keep_scale must be empty or have ", count, " elements, got ",
                threshold.size(), ", ", seed.size(), " and ", scale.size());
    for (size_t p = 0; p < threshold.size(); ++p)
      masks.push_back(mask_of(threshold[p], seed[p], scale[p], cols));
    masks.resize(count);
  }
  const Mask* operator[](int64_t p) const { return masks[p] ? &*masks[p] : nullptr; }
  bool any() const {
    for (const auto& mask : masks)
      if (mask) return true;
    return false;
  }
};

// The columns of s that are one projection's.
Matrix columns(const Matrix& s, int64_t begin, int64_t count) {
  Matrix part = s.from(0, begin);
  part.cols = count;
  return part;
}

// s [M, ΣR], with a column for each row of every b.
Matrix matrix_of_s(const Tensor& s, int64_t M, const List& b) {
  int64_t R = 0;
  for (const auto& of_one : b.tensors) R += of_one->size(0);
  TORCH_CHECK(s.scalar_type() == at::kFloat, "s must be float32, got ", s.scalar_type());
  return matrix(s, "s", M, R);
}

}  // namespace

// s = scale·(mask∘x)·a of each [M, ΣR] float32; x is one for all or one each.
Tensor projections_shrink(at::TensorList any_x, at::TensorList any_a, at::ArrayRef<double> scale,
                          at::IntArrayRef threshold, at::IntArrayRef seed,
                          at::ArrayRef<double> keep_scale) {
  check_usable();
  const List x(any_x, "x"), a(any_a, "a");
  const int64_t M = x[0].size(0), P = a.count(), R = a.cols();
  x.check("x", P, true);
  TORCH_CHECK(int64_t(scale.size()) == P, "scale must have ", P, " elements, got ", scale.size());
  const Masks masks(P, threshold, seed, keep_scale, x[0].size(1));
  Tensor s = at::empty({M, R}, x[0].options().dtype(at::kFloat));
  if (x.count() == 1 && M >= ROWS_BESIDE && R >= MEAN_RANK_BESIDE * P && !masks.any()) {
    std::vector<float> factors;
    for (int64_t p = 0; p < P; ++p) factors.insert(factors.end(), a[p].size(1), float(scale[p]));
    const Tensor whole = a.beside();
    const int64_t K = x[0].size(1);
    const Matrix row{reinterpret_cast<const char*>(factors.data()), Type::F32, 1, R, R, 1};
    Product product{matrix(x[0], "x", M, K), matrix(whole, "a", K, R)};
    product.factor = &row;
    product.out = s.data_ptr();
    compute({product});
    return s;
  }
  float* out = s.mutable_data_ptr<float>();
  std::vector<Product> products;
  products.reserve(P);
  for (int64_t p = 0; p < P; ++p) {
    const int64_t K = a[p].size(0);
    products.push_back(shrink_product(matrix(x[p], "x", M, K), matrix(a[p], "a", K, a[p].size(1)),
                                      masks[p], float(scale[p]), out));
    products.back().out_pitch = R;
    out += a[p].size(1);
  }
  compute(products);
  return s;
}

// y = x·w + bias + s·b of each [M, N]
std::vector<Tensor> projections_expand(const Tensor& any_x, at::TensorList any_w,
                                       const Tensor& any_s, at::TensorList any_b,
                                       const c10::List<std::optional<Tensor>>& any_bias) {
  check_usable();
  const auto x = in_memory(any_x, "x"), s = in_memory(any_s, "s");
  const List w(any_w, "w"), b(any_b, "b");
  const int64_t M = x->size(0), K = x->size(1), P = w.count();
  b.check("b", P);
  TORCH_CHECK(int64_t(any_bias.size()) == P, "bias must have ", P, " elements, got ",
              any_bias.size());
  const Matrix rows = matrix(*x, "x", M, K), all_s = matrix_of_s(*s, M, b);
  std::vector<Matrix> tails(P), each_b(P), each_bias(P);
  std::vector<c10::MaybeOwned<Tensor>> bias;
  std::vector<Product> products;
  std::vector<Tensor> out;
  bias.reserve(P);
  for (int64_t p = 0, r = 0; p < P; ++p) {
    const int64_t N = w[p].size(1), R = b[p].size(0);
    tails[p] = columns(all_s, r, R), each_b[p] = matrix(b[p], "b", R, N);
    out.push_back(at::empty({M, N}, x->options()));
    Product& product =
        products.emplace_back(Product{rows, matrix(w[p], "w", K, N), &tails[p], &each_b[p]});
    const std::optional<Tensor> given = any_bias.get(p);
    if (given) {
      bias.push_back(in_memory(*given, "bias"));
      each_bias[p] = matrix(bias.back()->unsqueeze(0), "bias", 1, N);
      product.bias = &each_bias[p];
    }
    product.out = out[p].data_ptr();
    product.out_type = type_of(x->scalar_type());
    r += R;
  }
  compute(products);
  return out;
}

// The sum of x·w + mask∘(s·b) over the projections [M, N], rounded once.
Tensor projections_sum(at::TensorList any_x, at::TensorList any_w, const Tensor& any_s,
                       at::TensorList any_b, at::IntArrayRef threshold, at::IntArrayRef seed,
                       at::ArrayRef<double> keep_scale) {
  check_usable();
  const List x(any_x, "x"), w(any_w, "w"), b(any_b, "b");
  const auto s = in_memory(any_s, "s");
  const int64_t M = x[0].size(0), N = w[0].size(1), P = x.count();
  w.check("w", P), b.check("b", P);
  const Matrix all_s = matrix_of_s(*s, M, b);
  const Masks masks(P, threshold, seed, keep_scale, N);
  const bool wide = x[0].scalar_type() == at::kFloat;
  Tensor y = at::empty({M, N}, x[0].options());
  Tensor sum = wide ? y : at::empty({M, N}, y.options().dtype(at::kFloat));
  for (int64_t p = 0, r = 0; p < P; ++p) {
    const int64_t K = x[p].size(1), R = b[p].size(0);
    const Matrix tail = columns(all_s, r, R), rows_b = matrix(b[p], "b", R, N);
    Product product{matrix(x[p], "x", M, K), matrix(w[p], "w", K, N), &tail, &rows_b};
    product.mask_out = masks[p];
    product.onto = p == 0 ? nullptr : sum.const_data_ptr<float>();
    const Tensor& to = p + 1 < P ? sum : y;
    product.out = to.data_ptr();
    product.out_type = type_of(to.scalar_type());
    compute({product});
    r += R;
  }
  return y;
}

// (mask∘left)ᵀ·right of each [C, D]; left is one for all or one each.
std::vector<Tensor> projections_wgrad(at::TensorList any_left, at::TensorList any_right,
                                      at::ScalarType dtype, at::IntArrayRef threshold,
                                      at::IntArrayRef seed, at::ArrayRef<double> keep_scale) {
  check_usable();
  const List left(any_left, "left"), right(any_right, "right");
  const int64_t P = std::max(left.count(), right.count()), M = left[0].size(0);
  left.check("left", P, true), right.check("right", P, true);
  const Masks masks(P, threshold, seed, keep_scale, left[0].size(1));
  std::vector<Tensor> out;
  if (left.count() == 1 && left[0].numel() >= X_BESIDE && !masks.any()) {
    const Tensor whole = wgrad(left[0], right.beside(), dtype, 0, 0, 1.0);
    for (int64_t p = 0, r = 0; p < P; r += right[p].size(1), ++p)
      out.push_back(whole.narrow(1, r, right[p].size(1)).contiguous());
    return out;
  }
  std::vector<Wgrad> problems;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t C = left[p].size(1), D = right[p].size(1);
    out.push_back(at::empty({C, D}, left[p].options().dtype(dtype)));
    problems.push_back(wgrad_of(matrix(left[p], "left", M, C), matrix(right[p], "right", M, D),
                                masks[p], out[p].data_ptr(), type_of(dtype)));
  }
  compute(std::move(problems));
  return out;
}

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  m.def(
      "projections_shrink(Tensor[] x, Tensor[] a, float[] scale, int[] threshold, int[] seed, "
      "float[] keep_scale) -> Tensor");
  m.def(
      "projections_expand(Tensor x, Tensor[] w, Tensor s, Tensor[] b, Tensor?[] bias) -> Tensor[]");
  m.def(
      "projections_sum(Tensor[] x, Tensor[] w, Tensor s, Tensor[] b, int[] threshold, int[] seed, "
      "float[] keep_scale) -> Tensor");
  m.def(
      "projections_wgrad(Tensor[] left, Tensor[] right, ScalarType dtype, int[] threshold, "
      "int[] seed, float[] keep_scale) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("projections_shrink", &projections_shrink);
  m.impl("projections_expand", &projections_expand);
  m.impl("projections_sum", &projections_sum);
  m.impl("projections_wgrad", &projections_wgrad);
}

}  // namespace lora_kernels
