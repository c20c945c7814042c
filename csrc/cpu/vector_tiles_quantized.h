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
// matrix. Its `Values` give half a group at a time, in an order of their own.
struct Nf4 {
  static constexpr int64_t RUN = NF4_BLOCK;  // the most elements of a run
  static constexpr int64_t BITS = 4;
  using Values = Groups16<4>;
  const uint8_t* codes;
  Table16 values;

  Nf4(const Quantized& w, float scale) : codes(w.codes), values(Table16::load(w.code)) {
    values.each([&](Vector v) { return v.times(Vector::all(scale)); });
  }
  void round(Type type) {
    values.each([&](Vector v) { return rounded(v, type); });
  }
  // The length of a whole run.
  static int64_t run(const Quantized&) { return RUN; }
  // How many elements from (row, col) on belong to the run.
  static int64_t left(const Quantized& w, int64_t row, int64_t col) {
    return RUN - (row * w.cols + col) % RUN;
  }
  // How many elements from (row, col) on are decoded as a part, so that `at` can go on.
  static int64_t head(const Quantized& w, int64_t row, int64_t col) {
    return (row * w.cols + col) % 2;
  }
  Vector at(int64_t e) const { return values.at(codes + e / 2); }  // an even e
  Vector part(int64_t e, int64_t count) const {
    float all[16], some[Vector::LANES] = {};
    values.store(all);
    for (int64_t i = 0; i < count; ++i, ++e)
      some[i] = all[(e % 2 ? codes[e / 2] : codes[e / 2] >> 4) & 15];
    return Vector::load(some);
  }
};

// The same beside halves, for few rows of x.
struct Nf4BesideHalves : Nf4 {
  using Values = Groups16<3>;
};

// Rows of 8-bit codes that are numbers of type T, in runs within a row.
template <class T>
struct Bytes {
  static constexpr int64_t RUN = BYTES_RUN;
  static constexpr int64_t BITS = 8;
  const uint8_t* codes;
  Vector scale;
  Type type = Type::F32;

  Bytes(const Quantized& w, float of_run) : codes(w.codes), scale(Vector::all(of_run)) {}
  void round(Type to) { type = to; }
  static int64_t run(const Quantized& w) { return w.run; }
  static int64_t left(const Quantized& w, int64_t, int64_t col) { return w.run - col % w.run; }
  static int64_t head(const Quantized&, int64_t, int64_t) { return 0; }
  Vector at(int64_t e) const {
    return rounded(Vector::load((const T*)codes + e).times(scale), type);
  }
  Vector part(int64_t e, int64_t count) const {
    T some[Vector::LANES] = {};
    std::memcpy(some, codes + e, count);
    return rounded(Vector::load(some).times(scale), type);
  }
  struct Values {
    explicit Values(const Quantized&) {}
    static constexpr int64_t order(int64_t i) { return i; }
    template <int WHICH>
    void half(const uint8_t* p, Vector* out) const {
      constexpr int64_t L = Vector::LANES;
#pragma GCC unroll 2
      for (int64_t i = 0; i < 32 / L; i += 2)
        Vector::load_two((const T*)p + WHICH * 32 + i * L, out + i);
    }
  };
};

// f of the decoder of w's format.
template <class F>
void with_decoder(const Quantized& w, const F& f) {
  if (w.format == Format::NF4) return f(static_cast<Nf4*>(nullptr));
  if (w.format == Format::INT8) return f(static_cast<Bytes<int8_t>*>(nullptr));
  f(static_cast<Bytes<E4M3>*>(nullptr));
}

// f of the decoder of w's format whose values few rows of x multiply.
template <class F>
void with_groups(const Quantized& w, const F& f) {
  if (w.format == Format::NF4 && w.type != Type::F32)
    return f(static_cast<Nf4BesideHalves*>(nullptr));
  with_decoder(w, f);
}

// each(scale, col, count) for the runs within `count` elements from (row, col) on.
template <class Codes, class Each>
inline __attribute__((always_inline)) void for_each_run(const Quantized& w, int64_t row,
                                                        int64_t col, int64_t count,
                                                        const Each& each) {
  constexpr int64_t MOST = 64;  // whole runs in a piece
  float scales[MOST + 1];
  const int64_t piece = MOST * Codes::run(w);
  for (int64_t end = col + count; col < end;) {
    const int64_t piece_end = end - col < piece ? end : col + piece;
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
  with_decoder(w, [&](auto* decoder) {
    using Codes = std::remove_pointer_t<decltype(decoder)>;
    if (type == Type::BF16) return decode_elements<Codes>((BF16*)dst, w, row, col, count);
    decode_elements<Codes>((float*)dst, w, row, col, count);
  });
}

constexpr int64_t GROUP = 64;       // codes that are decoded together, a run of every format
constexpr int64_t FETCHED = 16384;  // codes between those that are decoded and those asked for

// Of x these are multiplied at once: with their sums they stay in the L1 cache.
constexpr int64_t X_FLOATS = 2048;

template <class Codes>
const uint8_t* codes_of(const Quantized& w, int64_t row, int64_t col) {
  return w.codes + (row * w.cols + col) * Codes::BITS / 8;
}

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

// The sums of the products of half a group's values and those of one row of x.
inline __attribute__((always_inline)) Vector multiply_half(const float* x, const Vector* b) {
  constexpr int64_t L = Vector::LANES;
  Vector sum = Vector::load(x).times(b[0]);
#pragma GCC unroll 4
  for (int j = 1; j < GROUP / L / 2; ++j) sum = sum.multiply_add(Vector::load(x + j * L), b[j]);
  return sum;
}

// sums[r] += x[r]·(`depth` values of w), x arranged: each code is decoded once for all rows of x,
// and a scale multiplies the sum over its group. Sums of ROWS rows stay in registers; of any
// number, with ROWS 0, in memory.
template <class Codes, int ROWS>
void add_dots_of_groups(const typename Codes::Values& values, const float* x, int64_t x_pitch,
                        const uint8_t* codes, int64_t ahead, const float* scales, int64_t rows,
                        int64_t depth, float* sums) {
  constexpr int64_t L = Vector::LANES;
  constexpr int HALF = GROUP / L / 2;
  Vector acc[ROWS + 1];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) acc[r] = Vector::load(sums + r * L);
  for (const float* end = x + depth; x < end; x += GROUP, codes += GROUP * Codes::BITS / 8) {
    _mm_prefetch((const char*)codes + ahead, _MM_HINT_T0);
    const Vector scale = Vector::all(*scales++);
    if constexpr (ROWS > 0) {
      Vector b[HALF], part[ROWS];
      values.template half<0>(codes, b);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) part[r] = multiply_half(x + r * x_pitch, b);
      values.template half<1>(codes, b);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        part[r] = part[r].plus(multiply_half(x + r * x_pitch + GROUP / 2, b));
        acc[r] = acc[r].multiply_add(part[r], scale);
      }
    } else {
      Vector b[2 * HALF];
      values.template half<0>(codes, b);
      values.template half<1>(codes, b + HALF);
      for (int64_t r = 0; r < rows; ++r) {
        const float* xs = x + r * x_pitch;
        const Vector part = multiply_half(xs, b).plus(multiply_half(xs + GROUP / 2, b + HALF));
        Vector::load(sums + r * L).multiply_add(part, scale).store(sums + r * L);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) acc[r].store(sums + r * L);
}

// c[r][n] = x[r]·(row `row` + n of w), x arranged.
template <class Codes>
void dots_of_groups(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, int64_t rows,
                    int64_t cols, float* scratch, float* c, int64_t c_pitch) {
  constexpr int64_t L = Vector::LANES;
  const auto add = rows == 1   ? add_dots_of_groups<Codes, 1>
                   : rows == 2 ? add_dots_of_groups<Codes, 2>
                   : rows == 3 ? add_dots_of_groups<Codes, 3>
                   : rows == 4 ? add_dots_of_groups<Codes, 4>
                               : add_dots_of_groups<Codes, 0>;
  const typename Codes::Values values(w);
  const int64_t step = X_FLOATS / rows / GROUP * GROUP,
                runs = (w.cols + Codes::RUN - 1) / Codes::RUN;
  // Whole rows, of which a part is next.
  const int64_t ahead = (FETCHED + w.cols - 1) / w.cols * w.cols * Codes::BITS / 8;
  float* const sums = scratch;                      // [cols, rows, L]
  float* const scales = scratch + cols * rows * L;  // [cols, runs]
  std::memset(sums, 0, cols * rows * L * sizeof(float));
  for (int64_t n = 0; n < cols; ++n) w.scales(scales + n * runs, row + n, 0, w.cols);
  // An infinite scale makes elements of both signs, and NaN of 0, whose sum is NaN.
  for (int64_t i = 0; i < cols * runs; ++i) scales[i] += scales[i] - scales[i];
  for (int64_t k = 0; k < w.cols; k += step) {
    const int64_t depth = w.cols - k < step ? w.cols - k : step;
    for (int64_t n = 0; n < cols; ++n)
      add(values, x + k, x_pitch, codes_of<Codes>(w, row + n, k), ahead,
          scales + n * runs + k / Codes::RUN, rows, depth, sums + n * rows * L);
  }
  for (int64_t n = 0; n < cols; ++n) {
    for (int64_t r = 0; r < rows; ++r)
      c[r * c_pitch + n] = Vector::load(sums + (n * rows + r) * L).sum();
  }
}

// The scaled values of half a group.
template <int WHICH, class Values>
inline __attribute__((always_inline)) void scaled_half(const Values& values, const uint8_t* group,
                                                       float scale, Vector* out) {
  values.template half<WHICH>(group, out);
#pragma GCC unroll 4
  for (int64_t i = 0; i < GROUP / Vector::LANES / 2; ++i) out[i] = out[i].times(Vector::all(scale));
}

// sums[r][n] += x[r][k]·(row k of w)[col + n] for STEPS rows k of w, n in the order of decoding.
template <class Codes, int STEPS>
void add_rows_of_groups(const typename Codes::Values& values, const float* x, int64_t x_pitch,
                        const Quantized& w, int64_t k, int64_t col, int64_t rows, int64_t cols,
                        float* sums) {
  constexpr int64_t L = Vector::LANES;
  constexpr int HALF = GROUP / L / 2;
  const uint8_t* codes[STEPS];
  float scales[STEPS][MAX_ADDED_COLS / Codes::RUN + 1];
  for (int i = 0; i < STEPS; ++i) {
    codes[i] = codes_of<Codes>(w, k + i, col);
    w.scales(scales[i], k + i, col, cols);
  }
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
    const int64_t byte = at * Codes::BITS / 8, run = at / Codes::RUN;
#pragma GCC unroll 2
    for (int i = 0; i < STEPS; ++i) {
      _mm_prefetch((const char*)codes[i] + byte + STEPS * w.cols * Codes::BITS / 8, _MM_HINT_T0);
      scaled_half<0>(values, codes[i] + byte, scales[i][run], b + i * HALF);
    }
    add(at, b);
#pragma GCC unroll 2
    for (int i = 0; i < STEPS; ++i)
      scaled_half<1>(values, codes[i] + byte, scales[i][run], b + i * HALF);
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

void arrange(float* x, int64_t pitch, const Quantized& w, int64_t rows, int64_t cols) {
  with_groups(w, [&](auto* decoder) {
    arrange_groups<std::remove_pointer_t<decltype(decoder)>>(x, pitch, rows, cols);
  });
}

void quantized_dots(const float* x, int64_t x_pitch, const Quantized& w, int64_t row, int64_t rows,
                    int64_t cols, float* scratch, float* c, int64_t c_pitch) {
  with_groups(w, [&](auto* decoder) {
    dots_of_groups<std::remove_pointer_t<decltype(decoder)>>(x, x_pitch, w, row, rows, cols,
                                                             scratch, c, c_pitch);
  });
}

void quantized_rows(const float* x, int64_t x_pitch, const Quantized& w, int64_t col, int64_t rows,
                    int64_t cols, float* scratch, float* c, int64_t c_pitch) {
  with_groups(w, [&](auto* decoder) {
    rows_of_groups<std::remove_pointer_t<decltype(decoder)>>(x, x_pitch, w, col, rows, cols,
                                                             scratch, c, c_pitch);
  });
}

// All that every instruction set has.
constexpr Kernels table(const char* name) {
  return {
      .name = name,
      .rows = Vector::TILE_ROWS,
      .lanes = Vector::LANES,
      .copy = copy,
      .pack = pack,
      .store = store,
      .mask = mask,
      .multiply = multiply_rows<FloatUnit<float>>,
      .multiply_in_place = multiply_in_place,
      .dots = dots,
      .rows_of_w = rows_of_w,
      .decode = decode,
      .quantized_dots = quantized_dots,
      .quantized_rows = quantized_rows,
      .arrange = arrange,
      .squares = squares,
  };
}
