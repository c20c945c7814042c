// What one instruction set offers: a table of functions on tiles that lie in a cache.
//
// A product y = x·w is computed from tiles of x and panels of w. A tile holds up to `rows` rows of
// x, `PITCH` units apart; a panel holds `lanes` or 2·`lanes` columns of w, row after row. A unit is
// what one multiplication takes from x: a float, or, for the bfloat16 instructions, a pair of
// neighbouring k. Results are float32 tiles, added to in k's order, so that no blocking changes a
// bit.
#pragma once

#include <cstdint>

namespace lora_kernels {

constexpr int64_t DEPTH = 1024;  // the most units of k in one call
constexpr int64_t PITCH =
    DEPTH + 16;  // not a power of two: rows of a tile must not share a cache set

constexpr int64_t MAX_ROW_COLS = 4096;  // of w, where its rows are read where they lie

enum class Type { F32, BF16, F16 };

inline int64_t ceil_div(int64_t a, int64_t b) { return a == 0 ? 0 : (a - 1) / b + 1; }

inline int64_t size_of(Type type) { return type == Type::F32 ? 4 : 2; }

// A view of rows x cols elements; strides count elements.
struct Matrix {
  const char* data;
  Type type;
  int64_t rows, cols, row_stride, col_stride;

  Matrix from(int64_t row, int64_t col) const {
    return {data + (row * row_stride + col * col_stride) * size_of(type),
            type,
            rows - row,
            cols - col,
            row_stride,
            col_stride};
  }
  Matrix part(int64_t row, int64_t count) const {
    return {data + row * row_stride * size_of(type), type, count, cols, row_stride, col_stride};
  }
  Matrix transposed() const { return {data, type, cols, rows, col_stride, row_stride}; }
};

// The dropout mask of lora_kernels/dropout.py: an element is multiplied by `scale`, or by 0 where
// its word is below `threshold`. `cols` is the width of the whole masked matrix.
struct Mask {
  uint32_t threshold;
  uint64_t seed;
  float scale;
  int64_t cols;
  int64_t row = 0;  // of the operand's first row in that matrix
};

struct Quantized;  // a weight in a packed format, see quantized.h

struct Kernels {
  const char* name;
  int64_t rows;   // of a tile
  int64_t lanes;  // of a vector

  // dst[r][c] = src[r][c] for a rows x cols corner, `pitch` floats from row to row.
  void (*copy)(float* dst, int64_t pitch, const Matrix& src, int64_t rows, int64_t cols);
  // Panels of `width` columns of src, `panel` floats apart: rows x cols of it, row after row in
  // each panel.
  void (*pack)(float* dst, int64_t panel, int64_t width, const Matrix& src, int64_t rows,
               int64_t cols);
  // out[r][c] = scale·factor[c]·src[r][c] + bias[c], rounded to `type`; factor and bias may be
  // null. out may be src.
  void (*store)(void* out, Type type, int64_t row_stride, int64_t col_stride, const float* src,
                int64_t pitch, int64_t rows, int64_t cols, float scale, const float* factor,
                const float* bias);
  // Mask the rows x cols floats that are (row, col) onward of the operand; col is a multiple
  // of 4.
  void (*mask)(float* dst, int64_t pitch, const Mask& mask, int64_t row, int64_t col, int64_t rows,
               int64_t cols);
  // c = tile·panel, or c += tile·panel: rows x (vectors·lanes), vectors 1 or 2, depth <= DEPTH.
  void (*multiply)(int64_t rows, int64_t vectors, const float* tile, const float* panel,
                   int64_t depth, float* c, int64_t c_pitch, bool add);
  // The same for 2·lanes columns of w, contiguous, that are not packed; depth <= 256.
  void (*multiply_in_place)(int64_t rows, const float* tile, const Matrix& w, int64_t depth,
                            float* c, int64_t c_pitch, bool add);
  // c[r][n] = sum over k of x[r][k]·w[n][k], w's rows contiguous in k: rows x cols. x is followed
  // by zeros up to a multiple of `lanes`.
  void (*dots)(const float* x, int64_t x_pitch, const Matrix& w, int64_t rows, int64_t cols,
               int64_t depth, float* c, int64_t c_pitch);

  // c[r][n] = sum over k of x[r][k]·w[k][n], w's rows contiguous in n: 1 to 4 rows x cols, at most
  // MAX_ROW_COLS.
  void (*rows_of_w)(const float* x, int64_t x_pitch, const Matrix& w, int64_t rows, int64_t cols,
                    int64_t depth, float* c, int64_t c_pitch);

  // dst[i] = element (row, col + i) of w as stored, rounded as w says, in `type`: float32, or
  // bfloat16 where w's elements are.
  void (*decode)(void* dst, Type type, const Quantized& w, int64_t row, int64_t col, int64_t count);
  // As `dots` with the rows row .. row + cols of w as stored, and as `rows_of_w` with its columns
  // from `col` on, whole groups: at most MAX_DOT_ROWS rows of x, w's elements not rounded, each
  // decoded once. w is of `grouped`. `sums` takes rows·cols·lanes floats. x of `quantized_dots` is
  // arranged.
  void (*quantized_dots)(const float* x, int64_t x_pitch, const Quantized& w, int64_t row,
                         int64_t rows, int64_t cols, float* scratch, float* c, int64_t c_pitch);
  void (*quantized_rows)(const float* x, int64_t x_pitch, const Quantized& w, int64_t col,
                         int64_t rows, int64_t cols, float* scratch, float* c, int64_t c_pitch);
  // Puts the elements of x into the order in which those of w are decoded.
  void (*arrange)(float* x, int64_t pitch, const Quantized& w, int64_t rows, int64_t cols);
  // out[r] = the sum of src[r][c]² over c, src's rows contiguous.
  void (*squares)(float* out, const Matrix& src, int64_t rows, int64_t cols);

  // The same on pairs of bfloat16; null where the processor has no instruction for them. Pairs run
  // along src's columns in a tile, along its rows in a panel; depth counts pairs, and an odd last
  // element is paired with 0.
  void (*copy_pairs)(float* dst, int64_t pitch, const Matrix& src, int64_t rows, int64_t k);
  void (*pack_pairs)(float* dst, int64_t panel, int64_t width, const Matrix& src, int64_t k,
                     int64_t cols);
  // Rounds floats to pairs, in place: a tile's rows x k, or a panel's k rows.
  void (*round_pairs)(float* tile, int64_t pitch, int64_t rows, int64_t k);
  void (*pair_rows)(float* panel, int64_t width, int64_t k);
  void (*multiply_pairs)(int64_t rows, int64_t vectors, const float* tile, const float* panel,
                         int64_t depth, float* c, int64_t c_pitch, bool add);
  void (*dots_pairs)(const float* x, int64_t x_pitch, const Matrix& w, int64_t rows, int64_t cols,
                     int64_t k, float* c, int64_t c_pitch);
};

extern const Kernels AVX2_KERNELS;
extern const Kernels AVX512_KERNELS;
extern const Kernels AVX512_BF16_KERNELS;

// The best table for this processor and ATen's capability, or null. `use_kernels` names another
// one, for tests: "avx2", "avx512", "avx512_bf16", or "" for the best; false where the processor
// cannot run it.
const Kernels* kernels();
bool use_kernels(const char* name);

}  // namespace lora_kernels
