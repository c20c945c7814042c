// Quantised weights by strips: what their decoders share for every instruction set.
#include "quantized.h"

#include <algorithm>

#include "parallel.h"

namespace lora_kernels {
namespace {

constexpr int64_t STRIP_ROWS = 8;  // of a weight that are decoded before they are packed
constexpr int64_t DOT_STRIP = 4;   // before they are multiplied

// Asks for the codes of a part of a row that is decoded soon.
void fetch(const Quantized& q, int64_t row, int64_t col, int64_t count) {
  if (row >= q.rows) return;
  const int64_t first = (row * q.cols + col) * q.bits() / 8;
  for (int64_t i = 0; i < count * q.bits() / 8; i += 64) __builtin_prefetch(q.codes + first + i);
}

}  // namespace

void Quantized::scales(float* to, int64_t row, int64_t col, int64_t count) const {
  if (format != Format::NF4) {
    const float* of_row = absmax + row / block_rows * ((cols + block_cols - 1) / block_cols);
    const float unit = format == Format::INT8 ? float(1.0 / 127.0) : 1.0f;
    for (int64_t i = col / run; i <= (col + count - 1) / run; ++i)
      *to++ = of_row[i * run / block_cols] * unit;
    return;
  }
  const int64_t first = (row * cols + col) / NF4_BLOCK;
  const int64_t runs = (row * cols + col + count - 1) / NF4_BLOCK - first + 1;
  if (code2 == nullptr) {
    std::copy_n(absmax + first, runs, to);
    return;
  }
  for (int64_t i = 0; i < runs;) {
    const int64_t block = (first + i) / NF4_BLOCK2;
    const int64_t end = std::min(runs, (block + 1) * NF4_BLOCK2 - first);
    for (const float shared = absmax2[block]; i < end; ++i)
      to[i] = code2[absmax8[first + i]] * shared;
  }
  for (int64_t i = 0; i < runs; ++i) to[i] += offset;
}

void pack_quantized(const Kernels& k, bool pairs, float* dst, int64_t panel, int64_t width,
                    const Quantized& q, const Matrix& w, int64_t first, int64_t col, int64_t depth,
                    int64_t cols) {
  static thread_local Scratch scratch;
  const auto pack = pairs ? k.pack_pairs : k.pack;
  const Type type = pairs ? Type::BF16 : Type::F32;
  const bool across = w.row_stride == 1;  // a column of w is a row of q
  const int64_t rows = across ? width : STRIP_ROWS, length = across ? depth : cols;
  const int64_t pitch = aligned(length) + 16;
  char* const strip = reinterpret_cast<char*>(scratch.reserve(rows * pitch));
  for (int64_t r = 0, all = across ? cols : depth; r < all; r += rows) {
    const int64_t here = std::min(rows, all - r);
    const int64_t row = (across ? col : first) + r, from = across ? first : col;
    for (int64_t i = 0; i < here; ++i) {
      fetch(q, row + i + rows, from, length);
      k.decode(strip + i * pitch * size_of(type), type, q, row + i, from, length);
    }
    if (across) {
      pack(dst + r / width * panel, panel, width, {strip, type, depth, here, 1, pitch}, depth,
           here);
    } else {
      pack(dst + r / (pairs ? 2 : 1) * width, panel, width, {strip, type, here, cols, pitch, 1},
           here, cols);
    }
  }
}

void dots_with_quantized(const Kernels& k, bool pairs, const float* x, int64_t x_pitch,
                         const Quantized& q, int64_t col, int64_t rows, int64_t cols, float* c,
                         int64_t c_pitch) {
  static thread_local Scratch scratch;
  const auto dots = pairs ? k.dots_pairs : k.dots;
  const Type type = pairs ? Type::BF16 : Type::F32;
  const int64_t pitch = aligned(q.cols) + 16;
  char* const strip = reinterpret_cast<char*>(scratch.reserve(DOT_STRIP * pitch));
  for (int64_t n = 0; n < cols; n += DOT_STRIP) {
    const int64_t here = std::min(DOT_STRIP, cols - n);
    for (int64_t i = 0; i < here; ++i)
      k.decode(strip + i * pitch * size_of(type), type, q, col + n + i, 0, q.cols);
    dots(x, x_pitch, {strip, type, here, q.cols, pitch, 1}, rows, here, q.cols, c + n, c_pitch);
  }
}

}  // namespace lora_kernels
