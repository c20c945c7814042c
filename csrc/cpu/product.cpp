// The product by blocks: a thread packs a group of w's panels into its L2 cache and sweeps rows of
// x over them; the rank-R tail, bias and rounding follow while a tile of results is in L1. Few rows
// of x read w in place instead.
#include "product.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

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

// A block of columns of the result, and where its operands lie in the thread's scratch.
struct Columns {
  int64_t begin, count;   // of the result
  int64_t width, panels;  // of a panel, in the block
  float* tile;            // [rows, PITCH]: of x, then of s
  float* tail;            // [rows, panels·width]: mask_out∘(s·b)
  float* b;               // [panels, R, width]
  float* bias;            // [panels·width]
  float* factor;          // [panels·width]
  int64_t group = -1;     // whose b and bias are there
  int64_t pitch() const { return panels * width; }
};

// One product as tasks, which threads may take in any order once `prepare` has returned.
class Run {
 public:
  // `threads`: how many may be expected to share the tasks.
  Run(const Product& product, int64_t threads)
      : p(product),
        threads(threads),
        k(*kernels()),
        M(p.x.rows),
        N(p.w.cols),
        K(p.x.cols),
        R(p.s == nullptr ? 0 : p.s->cols),
        pairs(k.multiply_pairs != nullptr && p.x.type == Type::BF16 && p.w.type == Type::BF16),
        tail_pairs(k.multiply_pairs != nullptr && p.x.type == Type::BF16 && p.b != nullptr &&
                   p.b->type == Type::BF16),
        coded(p.quantized != nullptr && p.quantized->grouped() &&
              M <= (pairs ? MAX_CODED_ROWS_BESIDE_PAIRS : MAX_DOT_ROWS)) {
    if (M > 0 && N > 0) divide();
  }

  int64_t tasks() const { return tasks_; }
  // Floats that the tasks share: rows of x that are decoded once for all.
  int64_t shared_floats() const { return in_place_ == nullptr ? 0 : aligned(M * x_pitch()); }
  void prepare(float* shared);
  void task(int64_t index) const {
    return in_place_ == nullptr ? panels_task(index) : in_place_task(index);
  }

 private:
  const Product& p;
  const int64_t threads;
  const Kernels& k;
  const int64_t M, N, K, R;
  const bool pairs;
  const bool tail_pairs;           // s is rounded to b's type
  const bool coded;                // few rows multiply the codes of a quantised w where they lie
  int64_t tasks_ = 0, block_ = 0;  // of columns
  // A task is `block_` columns of w in place, or `rows_` rows of packed panels.
  decltype(Kernels::dots) in_place_ = nullptr;
  const float* x_ = nullptr;  // decoded
  int64_t rows_ = 0, width_ = 0;

  void divide() {
    // Few rows read w where it lies, along its memory. A w of few columns is transposed for that:
    // it is small.
    const bool few_columns = N <= DOT_COLS;
    const bool added = p.w.col_stride == 1 && p.w.row_stride != 1 &&
                       (p.quantized == nullptr ? M <= MAX_ADDED_ROWS : coded);
    if (p.w.row_stride == 1 || (few_columns && !added && p.quantized == nullptr)) {
      const bool by_pairs = pairs && !few_columns && !coded;
      if (M <= MAX_DOT_ROWS) return divide_in_place(DOT_COLS, by_pairs ? k.dots_pairs : k.dots);
    } else if (added) {
      // Long pieces of w's rows: 3.2 ms for 4096 x 4096 float32 in one piece, 5.2 in pieces of 512.
      // A large rank shortens them, since its part of b is packed for each.
      const int64_t share = ceil_div(ceil_div(N, threads), 64) * 64;
      const int64_t most =
          std::clamp<int64_t>((1 << 18) / std::max<int64_t>(R, 1) / 64 * 64, 128,
                              coded ? MAX_ROW_COLS / M / 64 * 64 : MAX_ROW_COLS);  // results in L1
      return divide_in_place(std::clamp<int64_t>(share, 128, most), k.rows_of_w);
    }
    divide_panels();
  }
  void divide_panels();
  std::pair<int64_t, int64_t> division(int64_t all, int64_t most, int64_t width) const;
  void divide_in_place(int64_t block, decltype(Kernels::dots) kernel) {
    in_place_ = kernel, block_ = block, tasks_ = ceil_div(N, block);
  }
  void panels_task(int64_t task) const;
  void in_place_task(int64_t task) const;
  int64_t x_pitch() const { return aligned(K) + 16; }
  void panel_task(int64_t row, int64_t rows, Columns& cols, float* w, float* c) const;
  void pack_w(float* to, int64_t from_unit, int64_t units, const Columns& cols) const;
  void load_x(float* to, int64_t row, int64_t rows, int64_t from_unit, int64_t units) const;
  void copy_x(float* to, int64_t pitch, int64_t row, int64_t from, int64_t rows,
              int64_t count) const;
  void pack_b(Columns& cols, int64_t group) const;
  void finish(int64_t row, int64_t rows, Columns& cols, float* c, int64_t c_pitch) const;
  void finish_rows(int64_t row, int64_t rows, const Columns& cols, float* c, int64_t c_pitch) const;
  bool direct(const Columns& cols) const {
    return p.out_type == Type::F32 && p.scale == 1.0f && p.mask_out == nullptr && !p.transpose &&
           (p.onto == nullptr || p.onto == p.out) && cols.count == cols.pitch();
  }
  // Elements from row to row of the output as it is stored.
  int64_t out_pitch() const { return p.out_pitch != 0 ? p.out_pitch : p.transpose ? M : N; }
  int64_t chunk() const {
    if (p.w.col_stride == 1 && M <= FEW_ROWS) return SHALLOW;
    return BLOCK_DEPTH;
  }
  int64_t depth() const { return std::min(chunk(), std::max<int64_t>(ceil_div(K, unit()), 1)); }
  int64_t unit() const { return pairs ? 2 : 1; }
  int64_t tail_units(int64_t ranks) const { return tail_pairs ? ceil_div(ranks, 2) : ranks; }
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
  copy_x(to, PITCH, row, first, rows, depth);
}

// rows x count elements of x, masked, as units.
void Run::copy_x(float* to, int64_t pitch, int64_t row, int64_t from, int64_t rows,
                 int64_t count) const {
  const bool as_pairs = pairs && (in_place_ == nullptr || in_place_ == k.dots_pairs);
  const Matrix x = p.x.from(row, from);
  if (as_pairs && p.mask_in == nullptr) return k.copy_pairs(to, pitch, x, rows, count);
  k.copy(to, pitch, x, rows, count);
  if (p.mask_in != nullptr) k.mask(to, pitch, *p.mask_in, row, from, rows, count);
  if (as_pairs) k.round_pairs(to, pitch, rows, count);
}

void Run::pack_b(Columns& cols, int64_t group) const {
  if (cols.group == group) return;
  cols.group = group;
  const int64_t panel = tail_units(R) * cols.width;
  if (cols.count < cols.pitch()) {
    std::memset(cols.b + (cols.panels - 1) * panel, 0, panel * sizeof(float));
    std::memset(cols.bias, 0, cols.pitch() * sizeof(float));
  }
  if (R > 0)
    (tail_pairs ? k.pack_pairs : k.pack)(cols.b, panel, cols.width, p.b[group].from(0, cols.begin),
                                         R, cols.count);
  if (p.bias != nullptr) k.copy(cols.bias, 0, p.bias[group].from(0, cols.begin), 1, cols.count);
  if (p.factor != nullptr) k.copy(cols.factor, 0, p.factor->from(0, cols.begin), 1, cols.count);
}

// `finish_rows` for each group's part of some rows; a task gives its rows in order.
void Run::finish(int64_t row, int64_t rows, Columns& cols, float* c, int64_t c_pitch) const {
  if (p.ends == nullptr) {
    pack_b(cols, 0);
    return finish_rows(row, rows, cols, c, c_pitch);
  }
  int64_t group = std::max<int64_t>(cols.group, 0);
  for (int64_t first = row, last = row + rows; first < last;) {
    while (p.ends[group] <= first) ++group;
    const int64_t end = std::min(p.ends[group], last);
    pack_b(cols, group);
    finish_rows(first, end - first, cols, c + (first - row) * c_pitch, c_pitch);
    first = end;
  }
}

// Adds the tail to the float32 results c of some rows, scales them, adds the bias and stores them;
// c may be the output itself, or what is kept before the factor.
void Run::finish_rows(int64_t row, int64_t rows, const Columns& cols, float* c,
                      int64_t c_pitch) const {
  float* sum = p.mask_out == nullptr ? c : cols.tail;
  const int64_t sum_pitch = p.mask_out == nullptr ? c_pitch : cols.pitch();
  for (int64_t r = 0; r < R; r += DEPTH) {
    const int64_t depth = std::min(DEPTH, R - r);
    k.copy(cols.tile, PITCH, p.s->from(row, r), rows, depth);
    if (tail_pairs) k.round_pairs(cols.tile, PITCH, rows, depth);
    for (int64_t g = 0; g < cols.panels; ++g)
      (tail_pairs ? k.multiply_pairs : k.multiply)(
          rows, cols.width / k.lanes, cols.tile,
          cols.b + (g * tail_units(R) + tail_units(r)) * cols.width, tail_units(depth),
          sum + g * cols.width, sum_pitch, sum == c || r > 0);
  }
  if (sum != c && R > 0) {
    k.mask(sum, sum_pitch, *p.mask_out, row, cols.begin, rows, cols.pitch());
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols.pitch(); ++j) c[i * c_pitch + j] += sum[i * sum_pitch + j];
  }
  const int64_t row_stride = p.transpose ? 1 : out_pitch();
  const int64_t col_stride = p.transpose ? out_pitch() : 1;
  const int64_t offset = (row * row_stride + cols.begin * col_stride) * size_of(p.out_type);
  const float* onto = p.onto == nullptr ? nullptr : p.onto + row * N + cols.begin;
  for (int64_t i = 0; onto != nullptr && onto != c && i < rows; ++i)
    for (int64_t j = 0; j < cols.count; ++j) c[i * c_pitch + j] += onto[i * N + j];
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
  const int64_t c_pitch = in_place ? out_pitch() : cols.pitch();
  if (in_place)
    c = static_cast<float*>(p.before == nullptr ? p.out : p.before) + row * c_pitch + cols.begin;
  const bool adds = in_place && p.onto != nullptr;  // to what is there
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
                                                tile_c + g * cols.width, c_pitch, u > 0 || adds);
      if (u + step >= units) finish(row + r, count, cols, tile_c, c_pitch);
    }
  }
}

// (rows, panels) of a task, by the least (rounds + 1/8)·(time of a task): threads take tasks in
// rounds, and the last to finish is late by a part of one. Per unit of k a task multiplies, copies
// x and packs w; on Zen 4 a copied row takes as long as 22 results, a packed column as long as 8.
std::pair<int64_t, int64_t> Run::division(int64_t all, int64_t most, int64_t width) const {
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

void Run::divide_panels() {
  width_ = N <= k.lanes ? k.lanes : 2 * k.lanes;
  const int64_t all = ceil_div(N, width_);
  const int64_t most = std::clamp<int64_t>(panel_floats() / (depth() * width_), 1, MAX_PANELS);
  const auto [rows, panels] = division(all, most, width_);
  rows_ = rows, block_ = panels * width_;
  tasks_ = ceil_div(all, panels) * ceil_div(M, rows_);
}

void Run::panels_task(int64_t task) const {
  const int64_t blocks = ceil_div(N, block_);
  Columns cols{};
  cols.begin = task % blocks * block_;
  cols.count = std::min(block_, N - cols.begin);
  if (cols.count <= 0) return;
  cols.width = width_;
  cols.panels = ceil_div(cols.count, width_);
  const int64_t begin = task / blocks * rows_, end = std::min(begin + rows_, M);
  // Results that are not yet complete after a chunk of k wait in the output or in scratch memory.
  const bool waits = !direct(cols) && ceil_div(K, unit()) > chunk();
  const int64_t step = waits ? std::min(rows_, MAX_SCRATCH_ROWS) : rows_;
  const int64_t results = direct(cols) ? 0 : aligned((waits ? step : k.rows) * block_);
  float* w = thread_scratch().reserve(tail_floats(block_) + aligned(depth() * block_) + results);
  float* c = w + aligned(depth() * block_);
  take_tail(cols, c + results);
  for (int64_t row = begin; row < end; row += step)
    panel_task(row, std::min(step, end - row), cols, w, c);
}

// Asks for the lines of a small matrix that lie apart, one row after the other.
void fetch(const Matrix& m, int64_t rows, int64_t cols) {
  if (m.col_stride != 1) return;
  const int64_t size = size_of(m.type), row = m.row_stride * size;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t byte = 0; byte < cols * size; byte += 64)
      __builtin_prefetch(m.data + r * row + byte);
}

// Few rows: x as floats, `block_` columns of w a task.
void Run::prepare(float* shared) {
  if (in_place_ == nullptr) return;
  const int64_t pitch = x_pitch();
  const int64_t used = in_place_ == k.dots_pairs ? ceil_div(K, 2) : K;
  copy_x(shared, pitch, 0, 0, M, K);
  for (int64_t row = 0; row < M; ++row)
    std::memset(shared + row * pitch + used, 0, (pitch - used) * sizeof(float));
  if (coded && in_place_ == k.dots) k.arrange(shared, pitch, *p.quantized, M, K);
  x_ = shared;
}

void Run::in_place_task(int64_t task) const {
  const bool copied = in_place_ == k.dots && p.w.row_stride != 1;
  const int64_t w_floats = copied  ? block_ * x_pitch()
                           : coded ? block_ * (M * k.lanes + K / 64 + 1)
                                   : 0;
  Columns cols{};
  cols.begin = task * block_;
  cols.count = std::min(block_, N - cols.begin);
  cols.width = 2 * k.lanes;
  cols.panels = ceil_div(cols.count, cols.width);
  float* w_copy = thread_scratch().reserve(M * block_ + w_floats + tail_floats(block_));
  float* c = w_copy + w_floats;
  take_tail(cols, c + M * block_);
  Matrix w = p.quantized == nullptr ? p.w.from(0, cols.begin) : p.w;
  if (in_place_ != k.rows_of_w) w = w.transposed();
  if (R > 0 && p.ends == nullptr)
    fetch(p.b->from(0, cols.begin), std::min(R, MAX_DOT_ROWS), std::min(cols.count, DOT_COLS));
  if (copied) {
    k.copy(w_copy, x_pitch(), w, cols.count, K);
    w = {reinterpret_cast<const char*>(w_copy), Type::F32, cols.count, K, x_pitch(), 1};
  }
  if (coded) {
    (in_place_ == k.rows_of_w ? k.quantized_rows : k.quantized_dots)(
        x_, x_pitch(), *p.quantized, cols.begin, M, cols.count, w_copy, c, block_);
  } else if (p.quantized != nullptr) {
    dots_with_quantized(k, in_place_ == k.dots_pairs, x_, x_pitch(), *p.quantized, cols.begin, M,
                        cols.count, c, block_);
  } else {
    in_place_(x_, x_pitch(), w, M, cols.count, K, c, block_);
  }
  for (int64_t row = 0; row < M; row += k.rows)
    finish(row, std::min(k.rows, M - row), cols, c + row * block_, block_);
}

int64_t work_of(const Product& p) {
  return p.x.rows * p.w.cols * (p.x.cols + (p.s == nullptr ? 0 : p.s->cols));
}

}  // namespace

Product shrink_product(const Matrix& x, const Matrix& a, const Mask* mask, float scale, void* s) {
  // A few columns are better computed as the rows of sᵀ = aᵀ·xᵀ, along x's memory.
  const bool transpose = a.cols <= MAX_DOT_ROWS && x.col_stride == 1 && mask == nullptr;
  Product product{x, a};
  if (transpose) product = {a.transposed(), x.transposed()};
  product.transpose = transpose;
  product.mask_in = mask;
  product.scale = scale;
  product.out = s;
  return product;
}

void compute(const std::vector<Product>& products) {
  int64_t work = 0, floats = 0;
  for (const Product& product : products) work += work_of(product);
  std::vector<Run> runs;
  runs.reserve(products.size());
  for (const Product& product : products) {
    runs.emplace_back(product, threads_for(work_of(product), work));
    floats += runs.back().shared_floats();
  }
  static thread_local Scratch caller;
  float* shared = caller.reserve(floats);
  for (Run& run : runs) {
    run.prepare(shared);
    shared += run.shared_floats();
  }
  for_each_task_of(runs, work);
}

}  // namespace lora_kernels
