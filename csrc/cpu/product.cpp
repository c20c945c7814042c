// The product by blocks: a thread packs a group of w's panels into its L2 cache and sweeps rows of
// x over them; the rank-R tail, bias and rounding follow while a tile of results is in L1. Few rows
// of x read w in place instead.
#include "product.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "parallel.h"

namespace lora_kernels {
namespace {

constexpr int64_t MAX_PANELS = 16;
constexpr int64_t FEW_ROWS = 32;  // so few that reading w decides: wide blocks, read along its rows
constexpr int64_t SHALLOW = 256;
constexpr int64_t MAX_SCRATCH_ROWS = 516;  // of float32 results that wait for their rounding
constexpr int64_t BLOCK_DEPTH = 512;       // deeper blocks are narrower, and read x more often
constexpr int64_t MAX_ADDED_ROWS = 4;
constexpr int64_t MAX_CODED_ROWS_BESIDE_PAIRS = 4;  // pairs multiply twice as fast; not measured
constexpr int64_t DOT_COLS = 64;                    // a task's share of w in the forms for few rows

// Half of the L2 cache, in floats: what a thread's packed panels may take.
int64_t panel_floats() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 18);
#else
  constexpr int64_t bytes = 1 << 20;
#endif
  return bytes / 8;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block of columns of the result, and where its operands lie in the thread's scratch.
struct Columns {
  int64_t begin, count;   // of the result
  int64_t width, panels;  // of a panel, in the block
  float* tile;            // [rows, PITCH]: of x, then of s
  float* tail;            // [rows, panels·width]: mask_out∘(s·b)
  float* b;               // [panels, R, width]
  float* bias;            // [panels·width]
  float* factor;          // [panels·width]
  int64_t pitch() const { return panels * width; }
};

class Run {
 public:
  explicit Run(const Product& product)
      : p(product),
        k(*kernels()),
        M(p.x.rows),
        N(p.w.cols),
        K(p.x.cols),
        R(p.s == nullptr ? 0 : p.s->cols),
        pairs(k.multiply_pairs != nullptr && p.x.type == Type::BF16 && p.w.type == Type::BF16 &&
              p.mask_in == nullptr),
        coded(p.quantized != nullptr && p.quantized->grouped() &&
              M <= (pairs ? MAX_CODED_ROWS_BESIDE_PAIRS : MAX_DOT_ROWS)) {}

  void operator()() const {
    if (M == 0 || N == 0) return;
    // Few rows read w where it lies, along its memory. A skinny w is transposed for that: it is
    // small.
    const bool skinny = N <= DOT_COLS;
    const bool added = p.w.col_stride == 1 && p.w.row_stride != 1 &&
                       (p.quantized == nullptr ? M <= MAX_ADDED_ROWS : coded);
    if (p.w.row_stride == 1 || (skinny && !added && p.quantized == nullptr)) {
      const bool by_pairs = pairs && !skinny && !coded;
      if (M <= MAX_DOT_ROWS) return in_place(DOT_COLS, by_pairs ? k.dots_pairs : k.dots);
    } else if (added) {
      // Long pieces of w's rows: 3.2 ms for 4096 x 4096 float32 in one piece, 5.2 in pieces of 512.
      // A large rank shortens them, since its part of b is packed for each.
      const int64_t share = ceil_div(ceil_div(N, at::get_num_threads()), 64) * 64;
      const int64_t most = std::clamp<int64_t>((1 << 18) / std::max<int64_t>(R, 1) / 64 * 64, 128,
                                               coded ? 4096 / M / 64 * 64 : 4096);  // results in L1
      return in_place(std::clamp<int64_t>(share, 128, most), k.rows_of_w);
    }
    by_panels();
  }

 private:
  const Product& p;
  const Kernels& k;
  const int64_t M, N, K, R;
  const bool pairs;
  const bool coded;  // few rows multiply the codes of a quantised w where they lie

  void by_panels() const;
  std::pair<int64_t, int64_t> division(int64_t all, int64_t most, int64_t width) const;
  void in_place(int64_t block, decltype(Kernels::dots) kernel) const;
  void panel_task(int64_t row, int64_t rows, Columns& cols, float* w, float* c) const;
  void pack_w(float* to, int64_t from_unit, int64_t units, const Columns& cols) const;
  void load_x(float* to, int64_t row, int64_t rows, int64_t from_unit, int64_t units) const;
  void pack_b(const Columns& cols) const;
  void finish(int64_t row, int64_t rows, const Columns& cols, float* c, int64_t c_pitch) const;
  bool direct(const Columns& cols) const {
    return p.out_type == Type::F32 && p.scale == 1.0f && p.mask_out == nullptr && !p.transpose &&
           cols.count == cols.pitch();
  }
  int64_t chunk() const {
    if (p.w.col_stride == 1 && M <= FEW_ROWS) return SHALLOW;
    return BLOCK_DEPTH;
  }
  int64_t unit() const { return pairs ? 2 : 1; }
  int64_t tail_floats(int64_t block) const {
    return aligned(k.rows * PITCH) + aligned(k.rows * block) + aligned(R * block) +
           2 * aligned(block);
  }
  // Sets the tail's pointers to consecutive pieces of `scratch`; the floats behind them.
  float* take_tail(Columns& cols, float* scratch) const {
    cols.tile = scratch;
    cols.tail = cols.tile + aligned(k.rows * PITCH);
    cols.b = cols.tail + aligned(k.rows * cols.pitch());
    cols.bias = cols.b + aligned(R * cols.pitch());
    cols.factor = cols.bias + aligned(cols.pitch());
    return cols.factor + aligned(cols.pitch());
  }
};

void Run::pack_w(float* to, int64_t from_unit, int64_t units, const Columns& cols) const {
  const int64_t first = from_unit * unit(), depth = std::min(units * unit(), K - first);
  if (cols.count < cols.pitch())
    std::memset(to + (cols.panels - 1) * units * cols.width, 0, units * cols.width * sizeof(float));
  if (p.quantized != nullptr)
    return pack_quantized(k, pairs, to, units * cols.width, cols.width, *p.quantized, p.w, first,
                          cols.begin, depth, cols.count);
  (pairs ? k.pack_pairs : k.pack)(to, units * cols.width, cols.width, p.w.from(first, cols.begin),
                                  depth, cols.count);
}

void Run::load_x(float* to, int64_t row, int64_t rows, int64_t from_unit, int64_t units) const {
  const int64_t first = from_unit * unit(), depth = std::min(units * unit(), K - first);
  const Matrix from = p.x.from(row, first);
  if (pairs) return k.copy_pairs(to, PITCH, from, rows, depth);
  k.copy(to, PITCH, from, rows, depth);
  if (p.mask_in != nullptr) k.mask(to, PITCH, *p.mask_in, row, first, rows, depth);
}

void Run::pack_b(const Columns& cols) const {
  if (cols.count < cols.pitch()) {
    std::memset(cols.b + (cols.panels - 1) * R * cols.width, 0, R * cols.width * sizeof(float));
    std::memset(cols.bias, 0, cols.pitch() * sizeof(float));
  }
  if (R > 0) k.pack(cols.b, R * cols.width, cols.width, p.b->from(0, cols.begin), R, cols.count);
  if (p.bias != nullptr) k.copy(cols.bias, 0, p.bias->from(0, cols.begin), 1, cols.count);
  if (p.factor != nullptr) k.copy(cols.factor, 0, p.factor->from(0, cols.begin), 1, cols.count);
}

// Adds the tail to the float32 results c of some rows, scales them, adds the bias and stores them;
// c may be the output itself, or what is kept before the factor.
void Run::finish(int64_t row, int64_t rows, const Columns& cols, float* c, int64_t c_pitch) const {
  float* sum = p.mask_out == nullptr ? c : cols.tail;
  const int64_t sum_pitch = p.mask_out == nullptr ? c_pitch : cols.pitch();
  for (int64_t r = 0; r < R; r += DEPTH) {
    const int64_t depth = std::min(DEPTH, R - r);
    k.copy(cols.tile, PITCH, p.s->from(row, r), rows, depth);
    for (int64_t g = 0; g < cols.panels; ++g)
      k.multiply(rows, cols.width / k.lanes, cols.tile, cols.b + (g * R + r) * cols.width, depth,
                 sum + g * cols.width, sum_pitch, sum == c || r > 0);
  }
  if (sum != c && R > 0) {
    k.mask(sum, sum_pitch, *p.mask_out, row, cols.begin, rows, cols.pitch());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols.pitch(); ++j) c[i * c_pitch + j] += sum[i * sum_pitch + j];
  }
  const int64_t row_stride = p.transpose ? 1 : N, col_stride = p.transpose ? M : 1;
  const int64_t offset = (row * row_stride + cols.begin * col_stride) * size_of(p.out_type);
  const float* bias = p.bias == nullptr ? nullptr : cols.bias;
  const float* factor = p.factor == nullptr ? nullptr : cols.factor;
  const auto store = [&](void* to, const float* times, const float* plus) {
    char* out = static_cast<char*>(to) + offset;
    if (static_cast<void*>(c) != out || times != nullptr || plus != nullptr)
      k.store(out, p.out_type, row_stride, col_stride, c, c_pitch, rows, cols.count, p.scale, times,
              plus);
  };
  if (p.before != nullptr) store(p.before, nullptr, nullptr);
  store(p.out, factor, bias);
}

void Run::panel_task(int64_t row, int64_t rows, Columns& cols, float* w, float* c) const {
  const int64_t units = ceil_div(K, unit()), step = chunk();
  const int64_t tile_rows = ceil_div(rows, ceil_div(rows, k.rows));
  const bool in_place = direct(cols), one_tile = !in_place && units <= step;
  const int64_t c_pitch = in_place ? N : cols.pitch();
  if (in_place)
    c = static_cast<float*>(p.before == nullptr ? p.out : p.before) + row * N + cols.begin;
  for (int64_t u = 0; u == 0 || u < units; u += step) {
    const int64_t depth = std::min(step, units - u);
    pack_w(w, u, depth, cols);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const int64_t count = std::min(tile_rows, rows - r);
      float* tile_c = one_tile ? c : c + r * c_pitch;
      load_x(cols.tile, row + r, count, u, depth);
      for (int64_t g = 0; g < cols.panels; ++g)
        (pairs ? k.multiply_pairs : k.multiply)(count, cols.width / k.lanes, cols.tile,
                                                w + g * depth * cols.width, depth,
                                                tile_c + g * cols.width, c_pitch, u > 0);
      if (u + step >= units) finish(row + r, count, cols, tile_c, c_pitch);
    }
  }
}

// (rows, panels) of a task, by the least (rounds + 1/8)·(time of a task): threads take tasks in
// rounds, and the last to finish is late by a part of one. Per unit of k a task multiplies, copies
// x and packs w; on Zen 4 a copied row takes as long as 22 results, a packed column as long as 8.
std::pair<int64_t, int64_t> Run::division(int64_t all, int64_t most, int64_t width) const {
  const int64_t threads = at::get_num_threads();
  const int64_t most_splits = std::clamp<int64_t>(M / (all == 1 ? 48 : 96), 1, 8 * threads);
  std::pair<int64_t, int64_t> best;
  int64_t least = INT64_MAX;
  for (int64_t splits = 1; splits <= most_splits; ++splits) {
    const int64_t rows = ceil_div(ceil_div(M, splits), k.rows) * k.rows;
    for (int64_t panels = std::min(most, all); panels > 0; --panels) {
      const int64_t cols = panels * width, tasks = ceil_div(M, rows) * ceil_div(all, panels);
      const int64_t task = rows * cols + 22 * rows + 8 * cols;
      const int64_t cost = (8 * ceil_div(tasks, threads) + (threads > 1)) * task;
      if (cost < least) {
        least = cost;
        best = {rows, panels};
      }
    }
  }
  return best;
}

void Run::by_panels() const {
  const int64_t width = N <= k.lanes ? k.lanes : 2 * k.lanes, all = ceil_div(N, width);
  const int64_t depth = std::min(chunk(), std::max<int64_t>(ceil_div(K, unit()), 1));
  const int64_t most = std::clamp<int64_t>(panel_floats() / (depth * width), 1, MAX_PANELS);
  const auto [rows, panels] = division(all, most, width);
  const int64_t chunks = ceil_div(M, rows), groups = ceil_div(all, panels), block = panels * width;
  for_each_task(groups * chunks, M * N * (K + R), [&](int64_t task) {
    Columns cols{};
    cols.begin = task / chunks * block;
    cols.count = std::min(block, N - cols.begin);
    if (cols.count <= 0) return;
    cols.width = width;
    cols.panels = ceil_div(cols.count, width);
    const int64_t begin = task % chunks * rows, end = std::min(begin + rows, M);
    // Results that are not yet complete after a chunk of k wait in the output or in scratch memory.
    const bool waits = !direct(cols) && ceil_div(K, unit()) > chunk();
    const int64_t step = waits ? std::min(rows, MAX_SCRATCH_ROWS) : rows;
    const int64_t results = direct(cols) ? 0 : aligned((waits ? step : k.rows) * block);
    float* w = thread_scratch().reserve(tail_floats(block) + aligned(depth * block) + results);
    float* c = w + aligned(depth * block);
    take_tail(cols, c + results);
    pack_b(cols);
    for (int64_t row = begin; row < end; row += step)
      panel_task(row, std::min(step, end - row), cols, w, c);
  });
}

// Few rows: x as floats, `block` columns of w a task.
void Run::in_place(int64_t block, decltype(Kernels::dots) kernel) const {
  const bool copied = kernel == k.dots && p.w.row_stride != 1;
  const int64_t x_pitch = aligned(K) + 16;
  const int64_t w_floats = copied  ? block * x_pitch
                           : coded ? block * (M * k.lanes + K / 64 + 1)
                                   : 0;
  static thread_local Scratch caller;  // x, decoded once for all tasks
  float* const x = caller.reserve(M * x_pitch);
  const int64_t used = kernel == k.dots_pairs ? K / 2 : K;
  for (int64_t row = 0; row < M; ++row)
    std::memset(x + row * x_pitch + used, 0, (x_pitch - used) * sizeof(float));
  (kernel == k.dots_pairs ? k.copy_pairs : k.copy)(x, x_pitch, p.x, M, K);
  if (p.mask_in != nullptr) k.mask(x, x_pitch, *p.mask_in, 0, 0, M, K);
  if (coded && kernel == k.dots) k.arrange(x, x_pitch, *p.quantized, M, K);
  for_each_task(ceil_div(N, block), M * N * (K + R), [&](int64_t task) {
    Columns cols{};
    cols.begin = task * block;
    cols.count = std::min(block, N - cols.begin);
    cols.width = 2 * k.lanes;
    cols.panels = ceil_div(cols.count, cols.width);
    float* w_copy = thread_scratch().reserve(M * block + w_floats + tail_floats(block));
    float* c = w_copy + w_floats;
    take_tail(cols, c + M * block);
    pack_b(cols);
    Matrix w = p.quantized == nullptr ? p.w.from(0, cols.begin) : p.w;
    if (kernel != k.rows_of_w) w = w.transposed();
    if (copied) {
      k.copy(w_copy, x_pitch, w, cols.count, K);
      w = {reinterpret_cast<const char*>(w_copy), Type::F32, cols.count, K, x_pitch, 1};
    }
    if (coded) {
      (kernel == k.rows_of_w ? k.quantized_rows : k.quantized_dots)(
          x, x_pitch, *p.quantized, cols.begin, M, cols.count, w_copy, c, block);
    } else if (p.quantized != nullptr) {
      dots_with_quantized(k, kernel == k.dots_pairs, x, x_pitch, *p.quantized, cols.begin, M,
                          cols.count, c, block);
    } else {
      kernel(x, x_pitch, w, M, cols.count, K, c, block);
    }
    for (int64_t row = 0; row < M; row += k.rows)
      finish(row, std::min(k.rows, M - row), cols, c + row * block, block);
  });
}

}  // namespace

void compute(const Product& product) { Run{product}(); }

}  // namespace lora_kernels
