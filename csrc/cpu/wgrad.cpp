// The tall reductions by blocks: some columns of the wide operand a thread, all of M in order,
// results in cache.
#include "wgrad.h"

#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace lora_kernels {
namespace {

constexpr int64_t ROWS = 128;      // of the wide operand packed at once
constexpr int64_t MAX_COLS = 512;  // 128 x 512 floats: a quarter of a megabyte, in L2

// Whether rows are multiplied as pairs of bfloat16: the low-rank operand is rounded where the
// result is.
bool by_pairs(const Kernels& k, const Wgrad& p) {
  return k.multiply_pairs != nullptr && p.wide.type == Type::BF16 &&
         (p.lowrank.type == Type::BF16 || p.out_type == Type::BF16);
}

// The low-rank operand as tiles: [M / DEPTH, S, PITCH].
void transpose_lowrank(const Kernels& k, const Wgrad& p) {
  const int64_t M = p.lowrank.rows, S = p.lowrank.cols;
  for (int64_t m = 0; m < M; m += DEPTH) {
    float* tile = p.workspace + m / DEPTH * S * PITCH;
    const int64_t depth = std::min(DEPTH, M - m);
    k.copy(tile, PITCH, p.lowrank.from(m, 0).transposed(), S, depth);
    if (by_pairs(k, p)) k.round_pairs(tile, PITCH, S, depth);
  }
}

void reduce_columns(const Kernels& k, const Wgrad& p, int64_t begin, int64_t count) {
  const int64_t M = p.wide.rows, S = p.lowrank.cols, width = 2 * k.lanes;
  const int64_t panels = ceil_div(count, width), pitch = panels * width;
  const int64_t tile_rows = ceil_div(S, ceil_div(S, k.rows));
  float* c = thread_scratch().reserve(aligned(S * pitch) + ROWS * pitch);  // [S, pitch]
  float* panel = c + aligned(S * pitch);                                   // [panels, ROWS, width]
  if (M == 0) std::memset(c, 0, S * pitch * sizeof(float));
  const bool pairs = by_pairs(k, p);
  const int64_t unit = pairs ? 2 : 1;
  const auto pack = pairs && p.mask == nullptr ? k.pack_pairs : k.pack;
  // A few rows of results are not worth packing whole panels for.
  const bool in_place = !pairs && p.mask == nullptr && p.wide.col_stride == 1 && S <= 2 * k.rows;
  const int64_t left = in_place ? count / width : 0;  // panels that are left where they lie
  for (int64_t m = 0; m < M; m += ROWS) {
    const int64_t depth = std::min(ROWS, M - m);
    if (count < pitch)
      std::memset(panel + (panels - 1) * ROWS * width, 0, ROWS * width * sizeof(float));
    if (left < panels)
      pack(panel + left * ROWS * width, ROWS * width, width, p.wide.from(m, begin + left * width),
           depth, count - left * width);
    for (int64_t g = 0; p.mask != nullptr && g < panels; ++g) {
      float* own = panel + g * ROWS * width;
      k.mask(own, width, *p.mask, m, begin + g * width, depth, std::min(width, count - g * width));
      if (pairs) k.pair_rows(own, width, depth);
    }
    for (int64_t g = 0; g < panels; ++g) {
      for (int64_t s = 0; s < S; s += tile_rows) {
        const int64_t rows = std::min(tile_rows, S - s);
        const float* tile = p.workspace + (m / DEPTH * S + s) * PITCH + m % DEPTH / unit;
        float* to = c + s * pitch + g * width;
        if (g < left) {
          k.multiply_in_place(rows, tile, p.wide.from(m, begin + g * width), depth, to, pitch,
                              m > 0);
        } else {
          (pairs ? k.multiply_pairs : k.multiply)(rows, 2, tile, panel + g * ROWS * width,
                                                  ceil_div(depth, unit), to, pitch, m > 0);
        }
      }
    }
  }
  char* out = static_cast<char*>(p.out) + begin * p.w_stride * size_of(p.out_type);
  k.store(out, p.out_type, p.s_stride, p.w_stride, c, pitch, S, count, 1.0f, nullptr, nullptr);
}

// One reduction as tasks of `cols` columns of the wide operand.
class Reduction {
 public:
  Reduction(const Wgrad& problem, int64_t threads) : p(problem), k(*kernels()) {
    if (p.wide.cols == 0 || p.lowrank.cols == 0) return;
    transpose_lowrank(k, p);
    const int64_t width = 2 * k.lanes;
    const int64_t share = ceil_div(ceil_div(p.wide.cols, 2 * threads), width) * width;
    cols = std::min(share, MAX_COLS);
  }
  int64_t tasks() const { return cols == 0 ? 0 : ceil_div(p.wide.cols, cols); }
  void task(int64_t i) const {
    reduce_columns(k, p, i * cols, std::min(cols, p.wide.cols - i * cols));
  }

 private:
  const Wgrad& p;
  const Kernels& k;
  int64_t cols = 0;
};

int64_t work_of(const Wgrad& p) { return p.wide.rows * p.wide.cols * p.lowrank.cols; }

int64_t workspace_floats(const Wgrad& p) {
  return ceil_div(p.lowrank.rows, DEPTH) * p.lowrank.cols * PITCH;
}

}  // namespace

Wgrad wgrad_of(const Matrix& left, const Matrix& right, const Mask* mask, void* out,
               Type out_type) {
  const int64_t C = left.cols, D = right.cols;
  // A masked operand is packed as the wide one.
  if (mask != nullptr || C >= D) return {left, right, mask, out, out_type, 1, D};
  return {right, left, nullptr, out, out_type, D, 1};
}

void compute(std::vector<Wgrad> problems) {
  int64_t work = 0, floats = 0;
  for (const Wgrad& problem : problems) {
    work += work_of(problem);
    floats += workspace_floats(problem);
  }
  // Of the call alone, since it grows with M; from PyTorch, whose error says how much there is not.
  const c10::DataPtr workspace = c10::GetCPUAllocator()->allocate(floats * sizeof(float));
  float* space = static_cast<float*>(workspace.get());
  for (Wgrad& problem : problems) {
    problem.workspace = space;
    space += workspace_floats(problem);
  }
  std::vector<Reduction> reductions;
  reductions.reserve(problems.size());
  for (const Wgrad& problem : problems)
    reductions.emplace_back(problem, threads_for(work_of(problem), work));
  for_each_task_of(reductions, work);
}

}  // namespace lora_kernels
