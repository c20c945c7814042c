// A weight in a packed format, and the memory of it that kernels need at once: strips of rows or
// columns, decoded while they are packed or multiplied. No whole weight is ever decoded.
#pragma once

#include "kernels.h"

namespace lora_kernels {

enum class Format { NF4, INT8, FP8 };
constexpr int64_t NF4_BLOCK = 64, NF4_BLOCK2 = 256;
constexpr int64_t BYTES_RUN = 64;         // of 8-bit codes where they are multiplied where they lie
constexpr int64_t MAX_ADDED_COLS = 4096;  // of a call of Kernels::quantized_rows

// A matrix as it is stored, [rows, cols]: element (row, col) is the value of its code times a
// scale, a float32 product that is rounded to `type`. Elements that share a scale are adjacent: a
// run.
struct Quantized {
  Format format;
  Type type;
  int64_t rows, cols;
  const uint8_t* codes;

  // See lora_kernels/quantized.py. NF4: the values of the codes; a scale for each 64 elements of
  // the flattened matrix, float32 in `absmax`, or, where code2 is not null, by 8-bit codes in
  // `absmax8`. INT8 and FP8: `absmax` of each block of block_rows x block_cols elements, row after
  // row of blocks; those of INT8 are whole rows. A run is a part of a block's row: all of it, or,
  // where that is a multiple of them, BYTES_RUN elements.
  int64_t block_rows = 1, block_cols = 1, run = NF4_BLOCK;
  const float* code = nullptr;
  const float* absmax = nullptr;
  const uint8_t* absmax8 = nullptr;
  const float* code2 = nullptr;
  const float* absmax2 = nullptr;
  float offset = 0.0f;

  // Whether rows are whole groups of codes, so that few rows of x can multiply them where they lie.
  bool grouped() const { return cols > 0 && cols % 64 == 0 && run % 64 == 0; }
  int64_t bits() const { return format == Format::NF4 ? 4 : 8; }  // of a code
  // The scale of each run that has a part in the `count` elements from (row, col) on. Compiled
  // without fused multiply-adds: product and sum are rounded one after the other.
  void scales(float* to, int64_t row, int64_t col, int64_t count) const;
};

// As Kernels::pack and Kernels::pack_pairs: depth x cols of w from (first, col) on, where w is the
// view of q, or of its transpose, that a product multiplies by; its strides say which.
void pack_quantized(const Kernels& k, bool pairs, float* dst, int64_t panel, int64_t width,
                    const Quantized& q, const Matrix& w, int64_t first, int64_t col, int64_t depth,
                    int64_t cols);

// As Kernels::dots for the columns of the transpose of q from `col` on, at most MAX_DOT_ROWS rows
// of x, in floats or, as Kernels::dots_pairs, in pairs.
void dots_with_quantized(const Kernels& k, bool pairs, const float* x, int64_t x_pitch,
                         const Quantized& q, int64_t col, int64_t rows, int64_t cols, float* c,
                         int64_t c_pitch);

}  // namespace lora_kernels
