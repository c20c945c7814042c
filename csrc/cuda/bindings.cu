// The operators of lora_kernels_cuda: they check what the launchers rely on, and put one kernel on
// the current stream.
//
// Everything is allocated by the caller, so that a call can be captured in a CUDA graph. Only
// LibTorch's stable ABI is used: one binary serves every PyTorch from 2.10 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <numeric>
#include <optional>
#include <string>

#include "decode_kernel.cuh"
#include "launch.h"
#include "wgrad_kernel.cuh"

// A PyTorch without CUDA does not have it; there the operators can be registered and refuse every
// tensor.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace lora_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool condition, const char* name, const char* rule) {
  if (!condition) throw std::runtime_error(std::string("lora_kernels_cuda: ") + name + " " + rule);
}

Type type_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return Type::float32;
  if (type == ScalarType::Half) return Type::float16;
  check(type == ScalarType::BFloat16, name, "must be float32, float16 or bfloat16");
  return Type::bfloat16;
}

void check_float_or(Type type, const Tensor& t, const char* name) {
  const Type own = type_of(t, name);
  check(own == type || own == Type::float32, name, "must have x's type or float32");
}

int64_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

void check_cuda(const Tensor& t, const char* name) {
  check(t.is_cuda(), name, "must be on a CUDA device");
}

void check_matrix(const Tensor& t, const char* name) {
  check_cuda(t, name);
  check(t.dim() == 2, name, "must have 2 dimensions");
}

void check_buffer(const Tensor& t, const char* name, ScalarType type) {
  check_cuda(t, name);
  check(t.scalar_type() == type, name,
        type == ScalarType::Int ? "must be int32" : "must be float32");
  check(t.is_contiguous(), name, "must be contiguous");
}

// `t` as rows of K elements; `transposed`: t is [K, rows].
Rows rows_of(const Tensor& t, const char* name, bool transposed) {
  const int row = transposed ? 1 : 0, k = 1 - row;
  check(t.size(row) <= INT32_MAX && t.size(k) <= INT32_MAX, name,
        "must have fewer than 2^31 rows and columns");
  Rows rows;
  rows.data = t.data_ptr();
  rows.count = int(t.size(row));
  rows.k_major = t.stride(k) == 1 || t.size(k) == 1;
  check(rows.k_major || t.stride(row) == 1 || t.size(row) == 1, name, "must have a unit stride");
  rows.stride = rows.k_major ? t.stride(row) : t.stride(k);
  const int64_t size = bytes_of(type_of(t, name));
  const int64_t run = rows.k_major ? t.size(k) : t.size(row);
  const int64_t address = int64_t(reinterpret_cast<uintptr_t>(rows.data));
  rows.align =
      int(std::gcd(std::gcd(int64_t(16), address), std::gcd(rows.stride * size, run * size)));
  return rows;
}

cudaStream_t current_stream(const Tensor& t) {
  check(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch", "was built without CUDA");
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "the device",
        "has no current stream");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  check(error == cudaSuccess, "the launch failed:", cudaGetErrorString(error));
}

// y = x·w + bias + s·b and s = alpha·x·a, or with `lowrank` y = alpha·x·w. x [M, K], w [K, N], a
// [K, R], b [R, N], y [M, N], s [M, R] float32, partials and arrived as the launchers' units say; s
// is given unless fused_rank is R.
void decode(Tensor x, Tensor w, Tensor a, Tensor b, std::optional<Tensor> bias, Tensor y, Tensor s,
            Tensor partials, Tensor arrived, std::optional<Tensor> alpha_at, double alpha,
            int64_t fused_rank, int64_t blocks, int64_t splits, int64_t chunk, bool lowrank) {
  check_matrix(x, "x"), check_matrix(w, "w"), check_matrix(y, "y"), check_matrix(s, "s");
  check_matrix(a, "a"), check_matrix(b, "b");
  const Type x_type = type_of(x, "x"), w_type = type_of(w, "w");
  const int64_t M = x.size(0), K = x.size(1), N = w.size(1), R = lowrank ? 0 : b.size(0);
  check(M >= 1 && M <= MAX_TOKENS, "x", "must have 1 to 32 rows");
  check(w.size(0) == K, "w", "must be [K, N]");
  check(y.size(0) == M && y.size(1) == N && y.is_contiguous(), "y", "must be [M, N], contiguous");
  check_float_or(x_type, w, "w"), check_float_or(x_type, y, "y");
  check_buffer(s, "s", ScalarType::Float), check_buffer(partials, "partials", ScalarType::Float);
  check_buffer(arrived, "arrived", ScalarType::Int);
  check(fused_rank == 0 || (fused_rank == R && R <= RANK_CHUNK), "fused_rank",
        "must be 0, or R and at most 32");
  check(splits >= 1 && chunk >= 1 && splits * chunk >= K, "splits and chunk", "must cover K");
  check(splits == 1 || chunk % step_of(w_type) == 0, "chunk",
        "must be a multiple of the tile's step");
  check(blocks >= 1, "blocks", "must be at least 1");
  const int64_t tiles = (N + rows_per_tile(w_type) - 1) / rows_per_tile(w_type);
  const int64_t slots = rows_per_tile(w_type) + ranks_per_tile(int(fused_rank));
  check(splits == 1 || (partials.numel() >= tiles * splits * M * slots && arrived.numel() >= tiles),
        "partials and arrived", "must hold every tile's sums");

  Decode p = {};
  p.x = rows_of(x, "x", false);
  check(p.x.k_major, "x", "must have adjacent elements in a row");
  p.w = rows_of(w, "w", true);
  if (fused_rank > 0) {
    // Other tiles have no ranks.
    check(
        p.w.k_major && w_type == x_type && x_type != Type::float32, "w",
        "must be half, with adjacent elements in a column, where a is multiplied in the same pass");
    check(a.size(0) == K && a.size(1) == R && type_of(a, "a") == x_type, "a",
          "must be [K, R] in x's type");
    p.a = rows_of(a, "a", true);
  }
  if (R > 0) {
    check(b.size(1) == N, "b", "must be [R, N]");
    check(s.size(0) == M && s.size(1) == R, "s", "must be [M, R]");
    check_float_or(x_type, b, "b");
    p.b = b.data_ptr(), p.b_row = b.stride(0), p.b_col = b.stride(1);
    p.b_float = b.scalar_type() == ScalarType::Float;
  }
  if (bias.has_value()) {
    check_cuda(*bias, "bias");
    check(bias->dim() == 1 && bias->size(0) == N && bias->is_contiguous() &&
              type_of(*bias, "bias") == x_type,
          "bias", "must be [N], contiguous, in x's type");
    p.bias = bias->data_ptr();
  }
  p.s_given = fused_rank > 0 ? nullptr : static_cast<const float*>(s.data_ptr());
  p.s = static_cast<float*>(s.data_ptr());
  if (alpha_at.has_value()) {
    check_buffer(*alpha_at, "alpha_at", ScalarType::Float);
    check(alpha_at->numel() == 1, "alpha_at", "must be one number");
    p.alpha_at = static_cast<const float*>(alpha_at->data_ptr());
  }
  p.alpha = float(alpha);
  p.y = y.data_ptr();
  p.y_float = y.scalar_type() == ScalarType::Float;
  p.partials = static_cast<float*>(partials.data_ptr());
  p.arrived = static_cast<int*>(arrived.data_ptr());
  p.k = int(K), p.rank = int(R), p.chunk = int(chunk);
  p.scale_y = lowrank;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const dim3 grid = dim3(unsigned(blocks), unsigned(splits));
  check_launch(launch_decode(p, x_type, w_type, int(fused_rank), grid, current_stream(x)));
}

// out [C, D] = leftᵀ·right: left [M, C], right [M, D], M <= 32; the one of rank's width is float32
// and contiguous.
void wgrad(Tensor left, Tensor right, Tensor out, bool left_is_wide) {
  check_matrix(left, "left"), check_matrix(right, "right"), check_matrix(out, "out");
  const Tensor& wide = left_is_wide ? left : right;
  const Tensor& lowrank = left_is_wide ? right : left;
  const char *wide_name = left_is_wide ? "left" : "right",
             *lowrank_name = left_is_wide ? "right" : "left";
  check(wide.size(0) == lowrank.size(0) && wide.size(0) <= OUTER_TOKENS, "left and right",
        "must have the same, at most 32, rows");
  check(wide.size(1) <= INT32_MAX, wide_name, "must have fewer than 2^31 columns");
  check_buffer(lowrank, lowrank_name, ScalarType::Float);
  check(out.size(0) == left.size(1) && out.size(1) == right.size(1) && out.is_contiguous(), "out",
        "must be [C, D], contiguous");
  const Type wide_type = type_of(wide, wide_name), out_type = type_of(out, "out");
  check(out_type == wide_type || out_type == Type::float32, "out",
        "must have the wide operand's type or float32");
  Wgrad p = {};
  p.wide = wide.data_ptr(), p.lowrank = static_cast<const float*>(lowrank.data_ptr()),
  p.out = out.data_ptr();
  p.wide_row = wide.stride(0), p.wide_column = wide.stride(1);
  p.out_column = left_is_wide ? out.stride(0) : out.stride(1),
  p.out_rank = left_is_wide ? out.stride(1) : out.stride(0);
  p.tokens = int(wide.size(0)), p.columns = int(wide.size(1)), p.rank = int(lowrank.size(1));
  const torch::stable::accelerator::DeviceGuard guard(wide.get_device_index());
  check_launch(launch_wgrad(p, wide_type, out_type, current_stream(wide)));
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY(lora_kernels_cuda, m) {
  m.def(
      "decode(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? bias, Tensor(a!) y, Tensor(b!) s, "
      "Tensor(c!) partials, "
      "Tensor(d!) arrived, Tensor? alpha_at, float alpha, int fused_rank, int blocks, int splits, "
      "int chunk, "
      "bool lowrank) -> ()");
  m.def("wgrad(Tensor left, Tensor right, Tensor(a!) out, bool left_is_wide) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(lora_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("decode", TORCH_BOX(&lora_kernels::decode));
  m.impl("wgrad", TORCH_BOX(&lora_kernels::wgrad));
}
