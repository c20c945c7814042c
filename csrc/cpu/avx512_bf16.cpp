// The table for processors whose AVX-512 multiplies pairs of bfloat16 into float32.
#if defined(__x86_64__)
#define LORA_KERNELS_AVX512_BF16
#include "elements.h"
#include "quantized.h"

#ifdef __clang__
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace lora_kernels {
namespace {
#include "vector_avx512.h"
#include "vector_tiles.h"
#include "vector_tiles_quantized.h"

struct PairUnit {
  using Element = BF16;
  static constexpr int64_t PER_LANE = 2;
  static Vector load(const BF16* p) { return Vector::load((const float*)p); }
  static Vector multiply_add(Vector acc, Vector a, Vector b) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)_mm512_castps_si512(a.v),
                             (__m512bh)_mm512_castps_si512(b.v))};
  }
};

inline void store_pair(float* dst, uint32_t low, uint32_t high) {
  const uint32_t pair = low | high << 16;
  std::memcpy(dst, &pair, 4);
}

// dst[r][p] = elements (r, 2p) and (r, 2p + 1) of src.
void copy_pairs(float* dst, int64_t pitch, const Matrix& src, int64_t rows, int64_t k) {
  const uint16_t* data = (const uint16_t*)src.data;
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* from = data + r * src.row_stride;
    float* to = dst + r * pitch;
    if (src.col_stride == 1) {
      int64_t p = 0;
      for (; p + 16 <= k / 2; p += 16) {
        _mm_prefetch((const char*)(from + rows * src.row_stride + 2 * p),
                     _MM_HINT_T1);  // next tile
        Vector::load((const float*)(from + 2 * p)).store(to + p);
      }
      std::memcpy(to + p, from + 2 * p, (k / 2 - p) * 4);
    } else {
      for (int64_t p = 0; p < k / 2; ++p)
        store_pair(to + p, from[2 * p * src.col_stride], from[(2 * p + 1) * src.col_stride]);
    }
    if (k % 2) store_pair(to + k / 2, from[(k - 1) * src.col_stride], 0);
  }
}

inline uint32_t element(const Matrix& m, int64_t row, int64_t col) {
  return ((const uint16_t*)m.data)[row * m.row_stride + col * m.col_stride];
}

// Pairs along contiguous k are 32 adjacent bits: one panel by transposing 16 x 16 of them.
void transpose_pairs(float* dst, int64_t width, const Matrix& src, int64_t pairs, int64_t cols) {
  const uint16_t* data = (const uint16_t*)src.data;
  const int64_t whole_pairs = pairs / 16 * 16, whole_cols = cols / 16 * 16;
  for (int64_t c = 0; c < whole_cols; c += 16) {
    for (int64_t p = 0; p < whole_pairs; p += 16) {
      Vector block[16];
      for (int64_t i = 0; i < 16; ++i)
        block[i] = Vector::load((const float*)(data + 2 * p + (c + i) * src.col_stride));
      Vector::transpose(block);
      for (int64_t i = 0; i < 16; ++i) block[i].store(dst + (p + i) * width + c);
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t c = p < whole_pairs ? whole_cols : 0; c < cols; ++c)
      std::memcpy(dst + p * width + c, data + 2 * p + c * src.col_stride, 4);
  }
}

// Pairs of two rows with contiguous columns: 16 columns at once, across panels.
void interleave_pairs(float* dst, int64_t panel, int64_t width, const Matrix& src, int64_t pairs,
                      int64_t cols) {
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t* low = (const uint16_t*)src.data + 2 * p * src.row_stride;
    const uint16_t* high = low + src.row_stride;
    float* to_panel = dst + p * width;
    for (int64_t c = 0; c < cols; c += width, to_panel += panel) {
      const int64_t end = cols - c < width ? cols : c + width;
      float* to = to_panel;
      int64_t i = c;
      for (; i + 16 <= end; i += 16, to += 16) {
        _mm_prefetch((const char*)(low + ROWS_AHEAD * src.row_stride + i), _MM_HINT_T0);
        _mm_prefetch((const char*)(high + ROWS_AHEAD * src.row_stride + i), _MM_HINT_T0);
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + i)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + i)));
        _mm512_storeu_si512(to, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
      for (; i < end; ++i) store_pair(to++, low[i], high[i]);
    }
  }
}

// Row p of a panel holds elements (2p, c) and (2p + 1, c) of src.
void pack_pairs(float* dst, int64_t panel, int64_t width, const Matrix& src, int64_t k,
                int64_t cols) {
  const int64_t pairs = k / 2;
  if (src.col_stride == 1) {
    interleave_pairs(dst, panel, width, src, pairs, cols);
  } else if (src.row_stride == 1) {
    for (int64_t c = 0; c < cols; c += width)
      transpose_pairs(dst + c / width * panel, width, src.from(0, c), pairs,
                      cols - c < width ? cols - c : width);
  }
  const bool by_elements = src.col_stride != 1 && src.row_stride != 1;
  for (int64_t p = by_elements ? 0 : pairs; p < (k + 1) / 2; ++p) {
    for (int64_t c = 0; c < cols; ++c)
      store_pair(dst + c / width * panel + p * width + c % width, element(src, 2 * p, c),
                 2 * p + 1 < k ? element(src, 2 * p + 1, c) : 0);
  }
}

void round_pairs(float* tile, int64_t pitch, int64_t rows, int64_t k) {
  const auto round = [](const float* from, float* to) {
    const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    _mm512_storeu_si512(to, (__m512i)pairs);
  };
  for (int64_t r = 0; r < rows; ++r, tile += pitch) {
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) round(tile + i, tile + i / 2);
    if (i == k) continue;
    float rest[32] = {};
    std::memcpy(rest, tile + i, (k - i) * sizeof(float));
    round(rest, rest);
    std::memcpy(tile + i / 2, rest, (k - i + 1) / 2 * sizeof(float));
  }
}

void pair_rows(float* panel, int64_t width, int64_t k) {
  // Elements of the first row, in the low halves, and of the second.
  const __m512i low_at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i high_at = _mm512_add_epi32(low_at, _mm512_set1_epi32(16));
  const __m512i order = _mm512_or_si512(low_at, _mm512_slli_epi32(high_at, 16));
  for (int64_t p = 0; p < (k + 1) / 2; ++p) {
    const float* low = panel + 2 * p * width;
    for (int64_t c = 0; c < width; c += 16) {
      const __m512 high = 2 * p + 1 < k ? _mm512_loadu_ps(low + width + c) : _mm512_setzero_ps();
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, _mm512_loadu_ps(low + c));
      _mm512_storeu_si512(panel + p * width + c, _mm512_permutexvar_epi16(order, both));
    }
  }
}

constexpr Kernels table_with_pairs() {
  Kernels kernels = table("avx512_bf16");
  kernels.copy_pairs = copy_pairs;
  kernels.pack_pairs = pack_pairs;
  kernels.round_pairs = round_pairs;
  kernels.pair_rows = pair_rows;
  kernels.multiply_pairs = multiply_rows<PairUnit>;
  kernels.dots_pairs = dots_elements<PairUnit>;
  return kernels;
}
}  // namespace

constexpr Kernels AVX512_BF16_KERNELS = table_with_pairs();

}  // namespace lora_kernels
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
