// The table for processors whose AVX-512 multiplies pairs of bfloat16 into float32.
#if defined(__x86_64__)
#include "elements.h"

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace lora_kernels {
namespace {
#include "vector_avx512.h"
#include "tiles.h"

struct PairUnit {
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
void copy_tile_pairs(float* dst, const Matrix& src, int64_t rows, int64_t k) {
  const uint16_t* data = (const uint16_t*)src.data;
  for (int64_t r = 0; r < rows; ++r) {
    const uint16_t* from = data + r * src.row_stride;
    float* to = dst + r * PITCH;
    if (src.col_stride == 1) {
      std::memcpy(to, from, k / 2 * 4);
    } else {
      for (int64_t p = 0; p < k / 2; ++p)
        store_pair(to + p, from[2 * p * src.col_stride], from[(2 * p + 1) * src.col_stride]);
    }
    if (k % 2) store_pair(to + k / 2, from[(k - 1) * src.col_stride], 0);
  }
}

// dst[p][c] = elements (2p, c) and (2p + 1, c) of src.
void copy_panel_pairs(float* dst, int64_t pitch, const Matrix& src, int64_t k, int64_t cols) {
  const uint16_t* data = (const uint16_t*)src.data;
  const int64_t pairs = k / 2;
  int64_t whole = 0;  // columns done by vectors
  if (src.row_stride == 1) {
    // A pair is 32 adjacent bits: a transposition of 32-bit units, the last few pairs one by one.
    const int64_t whole_pairs = pairs / 16 * 16;
    whole = whole_pairs ? cols / 16 * 16 : 0;
    for (int64_t c = 0; c < whole; c += 16) {
      for (int64_t p = 0; p < whole_pairs; p += 16) {
        Vector block[16];
        for (int64_t i = 0; i < 16; ++i)
          block[i] = Vector::load((const float*)(data + 2 * p + (c + i) * src.col_stride));
        Vector::transpose(block);
        for (int64_t i = 0; i < 16; ++i) block[i].store(dst + (p + i) * pitch + c);
      }
      for (int64_t p = whole_pairs; p < pairs; ++p) {
        for (int64_t i = c; i < c + 16; ++i)
          std::memcpy(dst + p * pitch + i, data + 2 * p + i * src.col_stride, 4);
      }
    }
  } else if (src.col_stride == 1) {
    whole = cols / 16 * 16;
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* low = data + 2 * p * src.row_stride;
      const uint16_t* high = low + src.row_stride;
      for (int64_t c = 0; c < whole; c += 16) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + c)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + c)));
        _mm512_storeu_si512(dst + p * pitch + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
  }
  const auto element = [&](int64_t row, int64_t col) -> uint32_t {
    return data[row * src.row_stride + col * src.col_stride];
  };
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t c = whole; c < cols; ++c)
      store_pair(dst + p * pitch + c, element(2 * p, c), element(2 * p + 1, c));
  }
  if (k % 2) {
    for (int64_t c = 0; c < cols; ++c) store_pair(dst + pairs * pitch + c, element(k - 1, c), 0);
  }
}
}  // namespace

const Kernels AVX512_BF16_KERNELS = {
    "avx512_bf16",
    Vector::TILE_ROWS,
    Vector::LANES,
    copy,
    store,
    mask,
    multiply_rows<FloatUnit, Vector::TILE_ROWS>,
    dots,
    copy_tile_pairs,
    copy_panel_pairs,
    multiply_rows<PairUnit, Vector::TILE_ROWS>,
};

}  // namespace lora_kernels
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
