// An operator for tests: the layer's forward for each of `calls` operands x, within one parallel
// region.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <vector>

namespace {

std::vector<at::Tensor> within_region(std::vector<at::Tensor> xs, const at::Tensor& weight,
                                      const at::Tensor& A, const at::Tensor& B) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               const at::Tensor&, const std::optional<at::Tensor>&, double, double,
                               int64_t, int64_t, const std::optional<at::Tensor>&);
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow("lora_kernels_cpu::lora_linear", "")
                      .typed<Signature>();
  std::vector<at::Tensor> ys(xs.size());
  at::parallel_for(0, int64_t(xs.size()), 1, [&](int64_t begin, int64_t end) {
    TORCH_CHECK(at::in_parallel_region(), "this is no parallel region");
    for (int64_t i = begin; i < end; ++i)
      ys[i] = op.call(xs[i], weight, A, B, std::nullopt, 0.5, 0.0, 0, 0, std::nullopt);
  });
  return ys;
}

}  // namespace

TORCH_LIBRARY(lora_kernels_tests, m) {
  m.def("within_region(Tensor[] xs, Tensor weight, Tensor A, Tensor B) -> Tensor[]",
        &within_region);
}
