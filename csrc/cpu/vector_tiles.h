// The functions of the table over `Vector`, for whichever instruction set the including file
// compiles for.

inline float widened(float x) { return x; }
inline float widened(BF16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widened(F16 x) { return _cvtsh_ss(x.bits); }

// f of a matrix's elements, by their type.
template <class F>
inline __attribute__((always_inline)) void with_elements(const Matrix& m, const F& f) {
  if (m.type == Type::F32) return f((const float*)m.data);
  if (m.type == Type::BF16) return f((const BF16*)m.data);
  f((const F16*)m.data);
}

// f of the number of rows, 1 to MOST, as a constant.
template <int MOST, class F>
inline __attribute__((always_inline)) void with_rows(int64_t rows, const F& f) {
  if constexpr (MOST > 0) {
    if (rows < MOST) return with_rows<MOST - 1>(rows, f);
    f(std::integral_constant<int, MOST>());
  }
}

inline Vector load_part(const float* p, int64_t count) {
  if (count == Vector::LANES) return Vector::load(p);
  float buffer[Vector::LANES] = {};
  std::memcpy(buffer, p, count * sizeof(float));
  return Vector::load(buffer);
}

// dst[r][c] = src[r·row_stride + c·col_stride].
template <class T>
void copy_elements(float* dst, int64_t pitch, const T* src, int64_t row_stride, int64_t col_stride,
                   int64_t rows, int64_t cols) {
  constexpr int64_t L = Vector::LANES;
  if (col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = src + r * row_stride;
      float* to = dst + r * pitch;
      int64_t c = 0;
      for (; c + L <= cols; c += L) {
        _mm_prefetch((const char*)(from + rows * row_stride + c), _MM_HINT_T1);  // the next tile
        Vector::load(from + c).store(to + c);
      }
      for (; c < cols; ++c) to[c] = widened(from[c]);
    }
    return;
  }
  const int64_t whole_rows = row_stride == 1 ? rows / L * L : 0;
  const int64_t whole_cols = whole_rows ? cols / L * L : 0;
  for (int64_t c = 0; c < whole_cols; c += L) {
    for (int64_t r = 0; r < whole_rows; r += L) {
      Vector block[L];
      for (int64_t i = 0; i < L; ++i) block[i] = Vector::load(src + r + (c + i) * col_stride);
      Vector::transpose(block);
      for (int64_t i = 0; i < L; ++i) block[i].store(dst + (r + i) * pitch + c);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c)
      dst[r * pitch + c] = widened(src[r * row_stride + c * col_stride]);
  }
}

void copy(float* dst, int64_t pitch, const Matrix& src, int64_t rows, int64_t cols) {
  with_elements(src, [&](auto* data) {
    copy_elements(dst, pitch, data, src.row_stride, src.col_stride, rows, cols);
  });
}

constexpr int64_t ROWS_AHEAD =
    8;  // of the rows that are read together, which no hardware prefetcher follows

// The columns of src that are adjacent in memory are read across panels: 0.33 ns an element, panel
// by panel 0.72 (float32, 4096 x 4096, Zen 4).
template <class T>
void pack_rows(float* dst, int64_t panel, int64_t width, const T* src, int64_t row_stride,
               int64_t rows, int64_t cols) {
  constexpr int64_t L = Vector::LANES;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = src + r * row_stride;
    float* to_panel = dst + r * width;
    for (int64_t c = 0; c < cols; c += width, to_panel += panel) {
      const int64_t count = cols - c < width ? cols - c : width;
      float* to = to_panel;
      for (int64_t i = 0; i + L <= count; i += L, to += L) {
        _mm_prefetch((const char*)(from + ROWS_AHEAD * row_stride + c + i), _MM_HINT_T0);
        Vector::load(from + c + i).store(to);
      }
      for (int64_t i = count / L * L; i < count; ++i) *to++ = widened(from[c + i]);
    }
  }
}

void pack(float* dst, int64_t panel, int64_t width, const Matrix& src, int64_t rows, int64_t cols) {
  with_elements(src, [&](auto* data) {
    if (src.col_stride == 1) return pack_rows(dst, panel, width, data, src.row_stride, rows, cols);
    for (int64_t c = 0; c < cols; c += width, dst += panel)
      copy_elements(dst, width, data + c * src.col_stride, src.row_stride, src.col_stride, rows,
                    cols - c < width ? cols - c : width);
  });
}

template <class T>
void store_part(T* to, Vector value, int64_t count) {
  if (count == Vector::LANES) return value.store(to);
  T buffer[Vector::LANES];
  value.store(buffer);
  std::memcpy(to, buffer, count * sizeof(T));
}

// Columns of src become adjacent elements of out, L x L at a time.
template <class T>
void store_transposed(T* out, int64_t col_stride, const float* src, int64_t pitch, int64_t rows,
                      int64_t cols, float scale) {
  constexpr int64_t L = Vector::LANES;
  const Vector factor = Vector::all(scale), nothing = Vector::all(-0.0f);
  for (int64_t r = 0; r < rows; r += L) {
    const int64_t height = rows - r < L ? rows - r : L;
    for (int64_t c = 0; c < cols; c += L) {
      const int64_t width = cols - c < L ? cols - c : L;
      Vector block[L];
      for (int64_t i = 0; i < L; ++i)
        block[i] = i < height ? load_part(src + (r + i) * pitch + c, width) : Vector::zero();
      Vector::transpose(block);
      for (int64_t i = 0; i < width; ++i)
        store_part(out + r + (c + i) * col_stride, nothing.multiply_add(block[i], factor), height);
    }
  }
}

template <class T>
void store_elements(T* out, int64_t row_stride, int64_t col_stride, const float* src, int64_t pitch,
                    int64_t rows, int64_t cols, float scale, const float* factor,
                    const float* bias) {
  constexpr int64_t L = Vector::LANES;
  if (row_stride == 1 && col_stride != 1 && rows >= L / 2 && bias == nullptr && factor == nullptr)
    return store_transposed(out, col_stride, src, pitch, rows, cols, scale);
  const Vector all = Vector::all(scale), nothing = Vector::all(-0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = src + r * pitch;
    T* to = out + r * row_stride;
    for (int64_t c = 0; c < cols; c += L) {
      const int64_t count = cols - c < L ? cols - c : L;
      Vector shift = nothing, times = all;  // what adds nothing, not even to -0
      if (bias != nullptr) shift = load_part(bias + c, count);
      if (factor != nullptr) times = nothing.multiply_add(load_part(factor + c, count), all);
      const Vector value = shift.multiply_add(load_part(from + c, count), times);
      if (col_stride == 1) {
        store_part(to + c, value, count);
        continue;
      }
      T buffer[L];
      value.store(buffer);
      for (int64_t i = 0; i < count; ++i) to[(c + i) * col_stride] = buffer[i];
    }
  }
}

void store(void* out, Type type, int64_t row_stride, int64_t col_stride, const float* src,
           int64_t pitch, int64_t rows, int64_t cols, float scale, const float* factor,
           const float* bias) {
  const auto run = [&](auto* to) {
    store_elements(to, row_stride, col_stride, src, pitch, rows, cols, scale, factor, bias);
  };
  if (type == Type::F32) return run((float*)out);
  if (type == Type::BF16) return run((BF16*)out);
  run((F16*)out);
}

// What 4 * Words::LANES elements from a counter's first one on are multiplied by: `scale`, or 0
// where the element's word is below the threshold. Philox-4x32-10, see lora_kernels/dropout.py:
// each counter gives the words of four elements.
inline void keep_factors(uint64_t first_counter, const Mask& mask, Vector (&factors)[2]) {
  const Words first = Words::counters(first_counter);
  Words c[4] = {first, first.high(), Words::all(0), Words::all(0)};
  uint32_t k0 = uint32_t(mask.seed), k1 = uint32_t(mask.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words p0 = c[0].times(Words::all(0xD2511F53u)), p1 = c[2].times(Words::all(0xCD9E8D57u));
    c[0] = p1.high().exclusive_or(c[1], Words::all(k0));
    c[1] = p1;
    c[2] = p0.high().exclusive_or(c[3], Words::all(k1));
    c[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  Words::factors(c, mask.threshold, mask.scale, factors);
}

void mask(float* dst, int64_t pitch, const Mask& mask, int64_t row, int64_t col, int64_t rows,
          int64_t cols) {
  constexpr int64_t L = Vector::LANES;
  const uint64_t groups = uint64_t(mask.cols + 3) / 4;
  for (int64_t r = 0; r < rows; ++r, dst += pitch) {
    const uint64_t first = uint64_t(mask.row + row + r) * groups + uint64_t(col) / 4;
    for (int64_t c = 0; c < cols; c += 2 * L) {
      Vector factors[2];
      keep_factors(first + uint64_t(c) / 4, mask, factors);
      for (int64_t i = c; i < cols && i < c + 2 * L; i += L) {
        const int64_t count = cols - i < L ? cols - i : L;
        store_part(dst + i, load_part(dst + i, count).times(factors[(i - c) / L]), count);
      }
    }
  }
}

// The longest chain of additions. Chains are added to c one by one: at K = 4096 the float32 error
// is half of that of chains of 1024, and the same as ATen's.
constexpr int64_t CHAIN = 256;

// How elements T of w meet floats of x: one to a lane.
template <class T>
struct FloatUnit {
  using Element = T;
  static constexpr int64_t PER_LANE = 1;
  static Vector load(const T* p) { return Vector::load(p); }
  static Vector multiply_add(Vector acc, Vector a, Vector b) { return acc.multiply_add(a, b); }
};

// c (+)= tile·panel with all results in registers; `Unit` says how one unit of the tile meets one
// row of the panel. The panel is packed, or rows of T that lie `t_pitch` apart in a matrix.
template <class Unit, int ROWS, int VECTORS, bool PACKED, class T>
void multiply_block(const float* tile, const T* panel, int64_t t_pitch, int64_t depth, float* c,
                    int64_t c_pitch, bool add) {
  constexpr int L = Vector::LANES;
  const int64_t pitch = PACKED ? VECTORS * L : t_pitch;
  Vector acc[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) acc[i][j] = Vector::zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector b[VECTORS];
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      if constexpr (!PACKED)
        _mm_prefetch((const char*)(panel + (k + ROWS_AHEAD) * pitch + j * L), _MM_HINT_T0);
      b[j] = Vector::load(panel + k * pitch + j * L);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vector a = Vector::all(tile[i * PITCH + k]);
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) acc[i][j] = Unit::multiply_add(acc[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * c_pitch + j * L;
      (add ? acc[i][j].plus(Vector::load(to)) : acc[i][j]).store(to);
    }
  }
}

template <class Unit>
void multiply_rows(int64_t rows, int64_t vectors, const float* tile, const float* panel,
                   int64_t depth, float* c, int64_t c_pitch, bool add) {
  with_rows<Vector::TILE_ROWS>(rows, [&](auto ROWS) {
    for (int64_t k = 0; k == 0 || k < depth; k += CHAIN, add = true) {
      const int64_t count = depth - k < CHAIN ? depth - k : CHAIN;
      const float* rows_of_w = panel + k * vectors * Vector::LANES;
      (vectors == 2 ? multiply_block<Unit, ROWS, 2, true, float>
                    : multiply_block<Unit, ROWS, 1, true, float>)(tile + k, rows_of_w, 0, count, c,
                                                                  c_pitch, add);
    }
  });
}

void multiply_in_place(int64_t rows, const float* tile, const Matrix& w, int64_t depth, float* c,
                       int64_t c_pitch, bool add) {
  with_elements(w, [&](auto* data) {
    with_rows<Vector::TILE_ROWS>(rows, [&](auto ROWS) {
      multiply_block<FloatUnit<float>, ROWS, 2, false>(tile, data, w.row_stride, depth, c, c_pitch,
                                                       add);
    });
  });
}

// c[r][n] = x[r]·w[n] for ROWS x COLS, vectors along k. Beside it `ahead_rows` rows of w are
// fetched into the L2 cache: memory is read while the multipliers are busy. A function of its own:
// inlined into `dots_elements` one row took 15% longer (AVX-512, 768 x 768 in float32 or float16).
template <class Unit, int ROWS, int COLS>
__attribute__((noinline)) void dots_block(const float* x, int64_t x_pitch,
                                          const typename Unit::Element* w, int64_t w_pitch,
                                          int64_t depth, float* c, int64_t c_pitch,
                                          const typename Unit::Element* ahead, int64_t ahead_rows) {
  constexpr int64_t STEP = Vector::LANES * Unit::PER_LANE;
  Vector acc[ROWS][COLS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) acc[i][j] = Vector::zero();
  }
  const auto step = [&](const float* a_row, const Vector* b) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vector a = Vector::load(a_row + i * x_pitch);
#pragma GCC unroll 4
      for (int j = 0; j < COLS; ++j) acc[i][j] = Unit::multiply_add(acc[i][j], a, b[j]);
    }
  };
  Vector b[COLS];
  int64_t k = 0;
  for (; k + STEP <= depth; k += STEP) {
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) b[j] = Unit::load(w + j * w_pitch + k);
    for (int64_t j = 0; j < ahead_rows; ++j)
      _mm_prefetch((const char*)(ahead + j * w_pitch + k), _MM_HINT_T1);
    step(x + k / Unit::PER_LANE, b);
  }
  if (k < depth) {
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) {
      typename Unit::Element rest[STEP] = {};
      std::memcpy(rest, w + j * w_pitch + k, (depth - k) * sizeof(rest[0]));
      b[j] = Unit::load(rest);
    }
    step(x + k / Unit::PER_LANE, b);
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < COLS; ++j) c[i * c_pitch + j] = acc[i][j].sum();
  }
}

template <class Unit>
void dots_elements(const float* x, int64_t x_pitch, const Matrix& w, int64_t rows, int64_t cols,
                   int64_t depth, float* c, int64_t c_pitch) {
  constexpr int64_t STEP = Vector::DOT_COLS, MOST = Vector::DOT_ROWS;
  const auto* data = (const typename Unit::Element*)w.data;
  const int64_t w_pitch = w.row_stride, share = (rows + MOST - 1) / MOST;
  const int64_t count = (rows + share - 1) / share;  // 16 rows are 6, 6 and 4
  for (int64_t n = 0; n < cols; n += STEP) {
    // The first rows of x wait for memory; the others find w in a cache and fetch the next rows.
    const auto* next = data + (n + STEP) * w_pitch;
    int64_t fetched = 0;
    for (int64_t r = 0; r < rows; r += count) {
      const int64_t here = rows - r < count ? rows - r : count;
      const float* xr = x + r * x_pitch;
      float* cr = c + r * c_pitch + n;
      with_rows<MOST>(here, [&](auto ROWS) {
        if (n + STEP <= cols) {
          const int64_t due =
              n + 2 * STEP <= cols && share > 1 ? STEP * (r / count) / (share - 1) : 0;
          dots_block<Unit, ROWS, STEP>(xr, x_pitch, data + n * w_pitch, w_pitch, depth, cr, c_pitch,
                                       next + fetched * w_pitch, due - fetched);
          fetched = due;
        } else {
          for (int64_t j = 0; j < cols - n; ++j)
            dots_block<Unit, ROWS, 1>(xr, x_pitch, data + (n + j) * w_pitch, w_pitch, depth, cr + j,
                                      c_pitch, data, 0);
        }
      });
    }
  }
}

void dots(const float* x, int64_t x_pitch, const Matrix& w, int64_t rows, int64_t cols,
          int64_t depth, float* c, int64_t c_pitch) {
  if (w.type == Type::F32)
    return dots_elements<FloatUnit<float>>(x, x_pitch, w, rows, cols, depth, c, c_pitch);
  if (w.type == Type::BF16)
    return dots_elements<FloatUnit<BF16>>(x, x_pitch, w, rows, cols, depth, c, c_pitch);
  dots_elements<FloatUnit<F16>>(x, x_pitch, w, rows, cols, depth, c, c_pitch);
}

// c[r][n] (+)= the sum over STEPS rows of w, for ROWS rows of x.
template <int ROWS, int STEPS, class T>
void add_rows_of_w(const float* x, int64_t x_pitch, const T* w, int64_t w_pitch, int64_t cols,
                   float* c, int64_t c_pitch, bool add) {
  constexpr int64_t L = Vector::LANES;
  int64_t n = 0;
  for (; n + L <= cols; n += L) {
    Vector acc[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) acc[r] = Vector::zero();
#pragma GCC unroll 8
    for (int i = 0; i < STEPS; ++i) {
      const Vector b = Vector::load(w + i * w_pitch + n);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        acc[r] = acc[r].multiply_add(Vector::all(x[r * x_pitch + i]), b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      float* to = c + r * c_pitch + n;
      (add ? acc[r].plus(Vector::load(to)) : acc[r]).store(to);
    }
  }
  for (; n < cols; ++n) {
    for (int r = 0; r < ROWS; ++r) {
      float sum = 0;
      for (int i = 0; i < STEPS; ++i) sum += x[r * x_pitch + i] * widened(w[i * w_pitch + n]);
      c[r * c_pitch + n] = add ? c[r * c_pitch + n] + sum : sum;
    }
  }
}

// Rows of w whose sum is added to c at once: one chain of all of them loses digits.
constexpr int64_t ROWS_OF_SUM = 1024;

void rows_of_w(const float* x, int64_t x_pitch, const Matrix& w, int64_t rows, int64_t cols,
               int64_t depth, float* c, int64_t c_pitch) {
  if (depth == 0) {
    for (int64_t r = 0; r < rows; ++r) std::memset(c + r * c_pitch, 0, cols * sizeof(float));
  }
  float later[4 * MAX_ROW_COLS];
  with_elements(w, [&](auto* data) {
    with_rows<4>(rows, [&](auto ROWS) {
      const int64_t w_pitch = w.row_stride;
      for (int64_t first = 0; first < depth; first += ROWS_OF_SUM) {
        const int64_t end = depth - first < ROWS_OF_SUM ? depth : first + ROWS_OF_SUM;
        float* to = first == 0 ? c : later;
        const int64_t pitch = first == 0 ? c_pitch : MAX_ROW_COLS;
        int64_t k = first;
        for (; k + 8 <= end; k += 8)
          add_rows_of_w<ROWS, 8>(x + k, x_pitch, data + k * w_pitch, w_pitch, cols, to, pitch,
                                 k > first);
        for (; k < end; ++k)
          add_rows_of_w<ROWS, 1>(x + k, x_pitch, data + k * w_pitch, w_pitch, cols, to, pitch,
                                 k > first);
        for (int64_t r = 0; first > 0 && r < rows; ++r)
          for (int64_t n = 0; n < cols; ++n) c[r * c_pitch + n] += later[r * MAX_ROW_COLS + n];
      }
    });
  });
}

template <class T>
void squares_of_rows(float* out, const T* src, int64_t row_stride, int64_t rows, int64_t cols) {
  constexpr int64_t L = Vector::LANES, CHAINS = 4;
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = src + r * row_stride;
    Vector acc[CHAINS];
#pragma GCC unroll 4
    for (int i = 0; i < CHAINS; ++i) acc[i] = Vector::zero();
    int64_t c = 0;
    for (; c + CHAINS * L <= cols; c += CHAINS * L) {
#pragma GCC unroll 4
      for (int i = 0; i < CHAINS; ++i) {
        const Vector value = Vector::load(from + c + i * L);
        acc[i] = acc[i].multiply_add(value, value);
      }
    }
    float sum = acc[0].plus(acc[1]).plus(acc[2].plus(acc[3])).sum();
    for (; c < cols; ++c) sum += widened(from[c]) * widened(from[c]);
    out[r] = sum;
  }
}

void squares(float* out, const Matrix& src, int64_t rows, int64_t cols) {
  with_elements(src, [&](auto* data) { squares_of_rows(out, data, src.row_stride, rows, cols); });
}
