// The functions of the table on quantised weights over `Vector`, for whichever instruction set the
// including file compiles for. A format is a decoder: a struct like `Nf4`.

inline Vector rounded(Vector v, Type type) {
  if (type == Type::BF16) {
    BF16 half[Vector::LANES];
    v.store(half);
    return Vector::load(half);
  }
  if (type == Type::F16) {
    F16 half[Vector::LANES];
    v.store(half);
    return Vector::load(half);
  }
  return v;
}

// A run of 4-bit codes that share a scale: sixteen values are scaled, and then looked up.
struct Nf4 {
  static constexpr int64_t RUN = NF4_BLOCK;  // the most elements of a run
  const uint8_t* codes;
  Table16 values;

  Nf4() = default;
  Nf4(const Quantized& w, float scale) : codes(w.codes), values(Table16::load(w.code)) {
    values.each([&](Vector v) { return v.times(Vector::all(scale)); });
  }
  void round(Type type) {
    values.each([&](Vector v) { return rounded(v, type); });
  }
  // Whether runs begin at the same columns in every row.
  static bool aligned(const Quantized& w) { return w.cols % RUN == 0; }
  // How many elements from (row, col) on belong to the run.
  static int64_t left(const Quantized& w, int64_t row, int64_t col) {
    return RUN - (row * w.cols + col) % RUN;
  }
  // How many elements from (row, col) on are decoded as a part, so that `at` can go on.
  static int64_t head(const Quantized& w, int64_t row, int64_t col) {
    return (row * w.cols + col) % 2;
  }
  Vector at(int64_t e) const { return values.at(codes + e / 2); }  // an even e
  void fetch(int64_t e) const { _mm_prefetch((const char*)(codes + e / 2), _MM_HINT_T0); }
  Vector part(int64_t e, int64_t count) const {
    float all[16], some[Vector::LANES] = {};
    values.store(all);
    for (int64_t i = 0; i < count; ++i, ++e)
      some[i] = all[(e % 2 ? codes[e / 2] : codes[e / 2] >> 4) & 15];
    return Vector::load(some);
  }
};

// each(scale, col, count) for the runs within `count` elements from (row, col) on.
template <class Codes, class Each>
inline __attribute__((always_inline)) void for_each_run(const Quantized& w, int64_t row,
                                                        int64_t col, int64_t count,
                                                        const Each& each) {
  constexpr int64_t PIECE = 4096;
  float scales[PIECE / Codes::RUN + 1];
  for (int64_t end = col + count; col < end;) {
    const int64_t piece_end = end - col < PIECE ? end : col + PIECE;
    w.scales(scales, row, col, piece_end - col);
    for (const float* scale = scales; col < piece_end; ++scale) {
      const int64_t left = Codes::left(w, row, col);
      const int64_t here = left < piece_end - col ? left : piece_end - col;
      each(*scale, col, here);
      col += here;
    }
  }
}

template <class Codes, class T>
void decode_elements(T* dst, const Quantized& w, int64_t row, int64_t col, int64_t count) {
  constexpr int64_t L = Vector::LANES;
  const int64_t begin = col;
  for_each_run<Codes>(w, row, col, count, [&](float scale, int64_t col, int64_t count) {
    Codes run(w, scale);
    run.round(w.type);
    T* to = dst + col - begin;
    const int64_t e = row * w.cols + col;
    int64_t i = Codes::head(w, row, col);
    if (i > 0) store_part(to, run.part(e, i), i);
    for (; i + L <= count; i += L) run.at(e + i).store(to + i);
    if (i < count) store_part(to + i, run.part(e + i, count - i), count - i);
  });
}

void decode(void* dst, Type type, const Quantized& w, int64_t row, int64_t col, int64_t count) {
  if (type == Type::BF16) return decode_elements<Nf4>((BF16*)dst, w, row, col, count);
  decode_elements<Nf4>((float*)dst, w, row, col, count);
}

// c[r] = x[r]·(row `row` of w) for ROWS rows of x: each value is looked up once for all of them.
template <class Codes, int ROWS>
void dots_of_codes(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, float* c,
                   int64_t c_pitch) {
  constexpr int64_t L = Vector::LANES;
  constexpr int CHAINS = ROWS == 1 ? 4 : 2;  // of additions, so that none waits for another
  Vector acc[ROWS][CHAINS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < CHAINS; ++j) acc[r][j] = Vector::zero();
  }
  for_each_run<Codes>(w, row, 0, w.cols, [&](float scale, int64_t col, int64_t count) {
    const Codes run(w, scale);
    const float* from = x + col;
    const int64_t e = row * w.cols + col;
    const auto add_part = [&](int64_t i, int64_t some) {
      const Vector b = run.part(e + i, some);
      for (int r = 0; r < ROWS; ++r)
        acc[r][0] = acc[r][0].multiply_add(load_part(from + r * x_pitch + i, some), b);
    };
    int64_t i = Codes::head(w, row, col);
    if (i > 0) add_part(0, i);
    for (; i + CHAINS * L <= count; i += CHAINS * L) {
#pragma GCC unroll 4
      for (int j = 0; j < CHAINS; ++j) {
        const Vector b = run.at(e + i + j * L);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
          acc[r][j] = acc[r][j].multiply_add(Vector::load(from + r * x_pitch + i + j * L), b);
      }
    }
    for (; i < count; i += L) add_part(i, count - i < L ? count - i : L);
  });
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    Vector sum = acc[r][0].plus(acc[r][1]);
    if constexpr (CHAINS == 4) sum = sum.plus(acc[r][2].plus(acc[r][3]));
    c[r * c_pitch] = sum.sum();
  }
}

template <class Codes, int ROWS>
void dots_of_rows(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, int64_t rows,
                  int64_t cols, float* c, int64_t c_pitch) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS)
      return dots_of_rows<Codes, ROWS - 1>(x, x_pitch, w, row, rows, cols, c, c_pitch);
    for (int64_t n = 0; n < cols; ++n)
      dots_of_codes<Codes, ROWS>(x, x_pitch, w, row + n, c + n, c_pitch);
  }
}

void quantized_dots(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, int64_t rows,
                    int64_t cols, float* c, int64_t c_pitch) {
  dots_of_rows<Nf4, FEW_CODED_ROWS>(x, x_pitch, w, row, rows, cols, c, c_pitch);
}

// c[r][n] += the sum over k < STEPS of x[r][k]·(row `row` + k of w)[n], for ROWS rows of x and
// `count` elements from `col` on, which belong to one run in each row of w.
template <class Codes, int ROWS, int STEPS>
inline __attribute__((always_inline)) void add_run_of_rows(const float* x, int64_t x_pitch,
                                                           const Quantized& w, const Codes* runs,
                                                           int64_t row, int64_t col, int64_t count,
                                                           float* c, int64_t c_pitch) {
  constexpr int64_t L = Vector::LANES;
  const int64_t e = row * w.cols + col;
  const auto add = [&](int64_t n, int64_t some) __attribute__((always_inline)) {
    Vector acc[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) acc[r] = Vector::zero();
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k) {
      const int64_t first = e + k * w.cols + n;
      const Vector b = some == L ? runs[k].at(first) : runs[k].part(first, some);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        acc[r] = acc[r].multiply_add(Vector::all(x[r * x_pitch + k]), b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      float* to = c + r * c_pitch + n;
      store_part(to, acc[r].plus(some == L ? Vector::load(to) : load_part(to, some)), some);
    }
  };
  int64_t n = Codes::head(w, row, col);
  if (n > 0) add(0, n);
  for (; n + L <= count; n += L) add(n, L);
  if (n < count) add(n, count - n);
}

template <class Codes, int ROWS, int STEPS>
void add_rows_of_codes(const float* x, int64_t x_pitch, const Quantized& w, int64_t row,
                       int64_t col, int64_t cols, float* c, int64_t c_pitch) {
  constexpr int64_t PIECE = 16 * Codes::RUN;
  float scales[STEPS][PIECE / Codes::RUN + 1];
  for (int64_t at = col, end = col + cols; at < end;) {
    const int64_t piece_end = end - at < PIECE ? end : at + PIECE;
    for (int k = 0; k < STEPS; ++k) w.scales(scales[k], row + k, at, piece_end - at);
    for (int64_t i = 0; at < piece_end; ++i) {
      const int64_t left = Codes::left(w, row, at);
      const int64_t count = left < piece_end - at ? left : piece_end - at;
      Codes runs[STEPS];
      for (int k = 0; k < STEPS; ++k) {
        runs[k] = Codes(w, scales[k][i]);
        runs[k].fetch(((row + k + STEPS) * w.cols + at));
      }
      add_run_of_rows<Codes, ROWS, STEPS>(x, x_pitch, w, runs, row, at, count, c + at - col,
                                          c_pitch);
      at += count;
    }
  }
}

template <class Codes, int ROWS>
void rows_of_codes(const float* x, int64_t x_pitch, const Quantized& w, int64_t col, int64_t rows,
                   int64_t cols, float* c, int64_t c_pitch) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS)
      return rows_of_codes<Codes, ROWS - 1>(x, x_pitch, w, col, rows, cols, c, c_pitch);
    constexpr int STEPS = 4;
    for (int64_t r = 0; r < rows; ++r) std::memset(c + r * c_pitch, 0, cols * sizeof(float));
    int64_t k = 0;
    for (; Codes::aligned(w) && k + STEPS <= w.rows; k += STEPS)
      add_rows_of_codes<Codes, ROWS, STEPS>(x + k, x_pitch, w, k, col, cols, c, c_pitch);
    for (; k < w.rows; ++k)
      add_rows_of_codes<Codes, ROWS, 1>(x + k, x_pitch, w, k, col, cols, c, c_pitch);
  }
}

void quantized_rows(const float* x, int64_t x_pitch, const Quantized& w, int64_t col, int64_t rows,
                    int64_t cols, float* c, int64_t c_pitch) {
  rows_of_codes<Nf4, FEW_CODED_ROWS>(x, x_pitch, w, col, rows, cols, c, c_pitch);
}
