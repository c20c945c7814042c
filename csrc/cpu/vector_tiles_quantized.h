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

// 4-bit codes. A decoder has the values of one run: `at` and `part` give them in the order of the
// matrix, `half` gives those of half a group in the order that `order` says.
struct Nf4 {
  static constexpr int64_t RUN = NF4_BLOCK;  // the most elements of a run
  static constexpr int64_t BITS = 4;
  const uint8_t* codes;
  Table16 values;

  Nf4(const Quantized& w, float scale) : codes(w.codes), values(Table16::load(w.code)) {
    values.each([&](Vector v) { return v.times(Vector::all(scale)); });
  }
  void round(Type type) {
    values.each([&](Vector v) { return rounded(v, type); });
  }
  // How many elements from (row, col) on belong to the run.
  static int64_t left(const Quantized& w, int64_t row, int64_t col) {
    return RUN - (row * w.cols + col) % RUN;
  }
  // How many elements from (row, col) on are decoded as a part, so that `at` can go on.
  static int64_t head(const Quantized& w, int64_t row, int64_t col) {
    return (row * w.cols + col) % 2;
  }
  Vector at(int64_t e) const { return values.at(codes + e / 2); }  // an even e
  using Values = Groups16;
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

constexpr int64_t GROUP = 64;  // codes that are decoded together, of one run

// The codes of a weight whose rows are whole groups, and the scales of a part of a row.
template <class Codes>
struct Groups {
  static constexpr int64_t PIECE = 4096;
  static constexpr int VECTORS = GROUP / Vector::LANES, HALF = VECTORS / 2;
  float scales[PIECE / Codes::RUN + 1];
  const uint8_t* codes;

  void seek(const Quantized& w, int64_t row, int64_t col, int64_t count) {
    w.scales(scales, row, col, count);
    codes = w.codes + (row * w.cols + col) * Codes::BITS / 8;
  }
  // The scaled values of half a group, `at` elements behind the place sought.
  template <int WHICH>
  inline __attribute__((always_inline)) void half(const typename Codes::Values& values, int64_t at,
                                                  Vector* out) const {
    values.template half<WHICH>(codes + at * Codes::BITS / 8, Vector::all(scales[at / Codes::RUN]),
                                out);
  }
};

// Rows of x with the elements of each group in the order in which they are decoded.
template <class Codes>
void arrange_groups(float* x, int64_t pitch, int64_t rows, int64_t cols) {
  float natural[GROUP];
  for (int64_t r = 0; r < rows; ++r) {
    for (float* group = x + r * pitch; group < x + r * pitch + cols; group += GROUP) {
      std::memcpy(natural, group, sizeof natural);
      for (int64_t i = 0; i < GROUP; ++i) group[i] = natural[Codes::Values::order(i)];
    }
  }
}

// c[r][n] = x[r]·(row `row` + n of w), x arranged; `sums` takes cols·rows vectors. Each code is
// decoded once for all rows of x, of which a piece stays in the L1 cache.
template <class Codes>
void dots_of_groups(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, int64_t rows,
                    int64_t cols, float* sums, float* c, int64_t c_pitch) {
  constexpr int64_t L = Vector::LANES;
  constexpr int HALF = Groups<Codes>::HALF;
  const typename Codes::Values values(w);
  Groups<Codes> groups;
  const int64_t step = Groups<Codes>::PIECE / rows / GROUP * GROUP;
  std::memset(sums, 0, cols * rows * L * sizeof(float));
  for (int64_t k = 0; k < w.cols; k += step) {
    const int64_t depth = w.cols - k < step ? w.cols - k : step;
    for (int64_t n = 0; n < cols; ++n) {
      groups.seek(w, row + n, k, depth);
      for (int64_t at = 0; at < depth; at += GROUP) {
        _mm_prefetch((const char*)groups.codes + (at + 16 * GROUP) * Codes::BITS / 8, _MM_HINT_T0);
        Vector b[2 * HALF];
        groups.template half<0>(values, at, b);
        groups.template half<1>(values, at, b + HALF);
        for (int64_t r = 0; r < rows; ++r) {
          const float* from = x + r * x_pitch + k + at;
          float* to = sums + (n * rows + r) * L;
          Vector even = Vector::load(to), odd = Vector::zero();
#pragma GCC unroll 4
          for (int j = 0; j < 2 * HALF; j += 2) {
            even = even.multiply_add(Vector::load(from + j * L), b[j]);
            odd = odd.multiply_add(Vector::load(from + (j + 1) * L), b[j + 1]);
          }
          even.plus(odd).store(to);
        }
      }
    }
  }
  for (int64_t n = 0; n < cols; ++n) {
    for (int64_t r = 0; r < rows; ++r)
      c[r * c_pitch + n] = Vector::load(sums + (n * rows + r) * L).sum();
  }
}

// sums[r][n] += x[r][k]·(row k of w)[col + n] for STEPS rows k of w, n in the order of decoding.
template <class Codes, int STEPS>
void add_rows_of_groups(const typename Codes::Values& values, const float* x, int64_t x_pitch,
                        const Quantized& w, int64_t k, int64_t col, int64_t rows, int64_t cols,
                        float* sums) {
  constexpr int64_t L = Vector::LANES;
  constexpr int HALF = Groups<Codes>::HALF;
  Groups<Codes> groups[STEPS];
  for (int i = 0; i < STEPS; ++i) groups[i].seek(w, k + i, col, cols);
  const auto add = [&](int64_t at, const Vector* b) __attribute__((always_inline)) {
    for (int64_t r = 0; r < rows; ++r) {
      float* to = sums + r * cols + at;
      Vector a[STEPS];
#pragma GCC unroll 2
      for (int i = 0; i < STEPS; ++i) a[i] = Vector::all(x[r * x_pitch + k + i]);
#pragma GCC unroll 4
      for (int j = 0; j < HALF; ++j) {
        Vector acc = Vector::load(to + j * L);
#pragma GCC unroll 2
        for (int i = 0; i < STEPS; ++i) acc = acc.multiply_add(a[i], b[i * HALF + j]);
        acc.store(to + j * L);
      }
    }
  };
  for (int64_t at = 0; at < cols; at += GROUP) {
    Vector b[STEPS * HALF];
#pragma GCC unroll 2
    for (int i = 0; i < STEPS; ++i) {
      const int64_t ahead = at + STEPS * w.cols;
      _mm_prefetch((const char*)groups[i].codes + ahead * Codes::BITS / 8, _MM_HINT_T0);
      groups[i].template half<0>(values, at, b + i * HALF);
    }
    add(at, b);
#pragma GCC unroll 2
    for (int i = 0; i < STEPS; ++i) groups[i].template half<1>(values, at, b + i * HALF);
    add(at + GROUP / 2, b);
  }
}

// c[r][n] = sum over k of x[r][k]·(row k of w)[col + n]; `sums` takes rows·cols floats.
template <class Codes>
void rows_of_groups(const float* x, int64_t x_pitch, const Quantized& w, int64_t col, int64_t rows,
                    int64_t cols, float* sums, float* c, int64_t c_pitch) {
  const typename Codes::Values values(w);
  for (int64_t r = 0; r < rows; ++r) std::memset(c + r * c_pitch, 0, cols * sizeof(float));
  for (int64_t begin = 0; begin < w.rows; begin += CHAIN) {
    const int64_t end = w.rows - begin < CHAIN ? w.rows : begin + CHAIN;
    std::memset(sums, 0, rows * cols * sizeof(float));
    int64_t k = begin;
    for (; k + 2 <= end; k += 2)
      add_rows_of_groups<Codes, 2>(values, x, x_pitch, w, k, col, rows, cols, sums);
    if (k < end) add_rows_of_groups<Codes, 1>(values, x, x_pitch, w, k, col, rows, cols, sums);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < cols; ++n)
        c[r * c_pitch + n / GROUP * GROUP + Codes::Values::order(n % GROUP)] += sums[r * cols + n];
    }
  }
}

void arrange(float* x, int64_t pitch, const Quantized&, int64_t rows, int64_t cols) {
  arrange_groups<Nf4>(x, pitch, rows, cols);
}

void quantized_dots(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, int64_t rows,
                    int64_t cols, float* sums, float* c, int64_t c_pitch) {
  dots_of_groups<Nf4>(x, x_pitch, w, row, rows, cols, sums, c, c_pitch);
}

void quantized_rows(const float* x, int64_t x_pitch, const Quantized& w, int64_t col, int64_t rows,
                    int64_t cols, float* sums, float* c, int64_t c_pitch) {
  rows_of_groups<Nf4>(x, x_pitch, w, col, rows, cols, sums, c, c_pitch);
}
