// Both by blocks that stay in cache between their two readers: some columns of dy and z a thread,
// all rows in order; some rows of w a thread.
#include "scale.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"

namespace lora_kernels {
namespace {

constexpr int64_t ROWS = 32;       // of dy and z decoded at once
constexpr int64_t COLS = 256;      // 32 x 256 floats of each: 64 kilobytes
constexpr int64_t NORM_ROWS = 64;  // of w a task

void scale_columns(const Kernels& k, const Scale& p, int64_t begin, int64_t count) {
  float* dy = thread_scratch().reserve(2 * ROWS * COLS + 2 * COLS);
  float *z = dy + ROWS * COLS, *factor = z + ROWS * COLS, *sum = factor + COLS;
  double total[COLS] = {};
  k.copy(factor, 0, p.factor.from(0, begin), 1, count);
  const int64_t N = p.dy.cols;
  for (int64_t row = 0; row < p.dy.rows; row += ROWS) {
    const int64_t rows = std::min(ROWS, p.dy.rows - row);
    k.copy(dy, COLS, p.dy.from(row, begin), rows, count);
    if (p.z != nullptr) {
      k.copy(z, COLS, p.z->from(row, begin), rows, count);
      std::memset(sum, 0, count * sizeof(float));
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < count; ++j) sum[j] += dy[i * COLS + j] * z[i * COLS + j];
      for (int64_t j = 0; j < count; ++j) total[j] += sum[j];
    }
    char* out = static_cast<char*>(p.dz) + (row * N + begin) * size_of(p.dy.type);
    k.store(out, p.dy.type, N, 1, dy, COLS, rows, count, 1.0f, factor, nullptr);
  }
  if (p.z != nullptr) std::copy_n(total, count, p.dfactor + begin);
}

// What every task of the norms reads.
struct Shared {
  float* x;     // aᵀ as floats, [R, x_pitch], zeros behind K
  float* gram;  // aᵀ·a [R, R]
  int64_t x_pitch;
};

void norm_rows(const Kernels& k, const Norms& p, const Shared& shared, int64_t begin,
               int64_t count) {
  const int64_t K = p.w.cols, R = p.a.cols, x_pitch = shared.x_pitch;
  const bool copied = p.w.col_stride != 1;
  const int64_t tile = aligned(R * NORM_ROWS);
  float* c = thread_scratch().reserve(2 * tile + (copied ? NORM_ROWS * x_pitch : 0));
  float* u = c + tile;  // bᵀ of these rows, [R, NORM_ROWS]
  float* out = p.norms + begin;
  Matrix w = p.w.from(begin, 0);
  if (copied) {
    float* rows = u + tile;
    k.copy(rows, x_pitch, w, count, K);
    w = {reinterpret_cast<const char*>(rows), Type::F32, count, K, x_pitch, 1};
  }
  k.squares(out, w, count, K);
  if (R > 0) {
    k.dots(shared.x, x_pitch, w, R, count, K, c, NORM_ROWS);
    k.copy(u, NORM_ROWS, p.b.from(0, begin), R, count);
  }
  // In double, as the parts cancel where the adapter takes w away. aᵀ·a is symmetric.
  double total[NORM_ROWS], inner[NORM_ROWS];
  for (int64_t j = 0; j < count; ++j) total[j] = out[j];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t j = 0; j < count; ++j) inner[j] = 2.0 * c[r * NORM_ROWS + j];
    for (int64_t q = 0; q <= r; ++q) {
      const double factor = (q < r ? 2.0 : 1.0) * p.alpha * shared.gram[r * R + q];
      for (int64_t j = 0; j < count; ++j) inner[j] += factor * u[q * NORM_ROWS + j];
    }
    for (int64_t j = 0; j < count; ++j) total[j] += inner[j] * p.alpha * u[r * NORM_ROWS + j];
  }
  // A NaN is no less than zero, and stays.
  for (int64_t j = 0; j < count; ++j) out[j] = total[j] < 0.0 ? 0.0f : float(std::sqrt(total[j]));
}

}  // namespace

void compute(const Scale& p) {
  const Kernels& k = *kernels();
  const int64_t N = p.dy.cols, tasks = ceil_div(N, COLS);
  for_each_task(tasks, p.dy.rows * N * 4, [&](int64_t task) {
    scale_columns(k, p, task * COLS, std::min(COLS, N - task * COLS));
  });
}

void compute(const Norms& p) {
  const Kernels& k = *kernels();
  const int64_t N = p.w.rows, K = p.w.cols, R = p.a.cols, x_pitch = aligned(K) + 16;
  static thread_local Scratch caller;
  float* const x = caller.reserve(aligned(R * x_pitch) + R * R);
  const Shared shared{x, x + aligned(R * x_pitch), x_pitch};
  for (int64_t r = 0; r < R; ++r)
    std::memset(x + r * x_pitch + K, 0, (x_pitch - K) * sizeof(float));
  if (R > 0) {
    k.copy(x, x_pitch, p.a.transposed(), R, K);
    const Matrix rows{reinterpret_cast<const char*>(x), Type::F32, R, K, x_pitch, 1};
    k.dots(x, x_pitch, rows, R, R, K, shared.gram, R);
  }
  for_each_task(ceil_div(N, NORM_ROWS), N * K * (R + 1), [&](int64_t task) {
    norm_rows(k, p, shared, task * NORM_ROWS, std::min(NORM_ROWS, N - task * NORM_ROWS));
  });
}

}  // namespace lora_kernels
