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

  Nf4(const Quantized& w, float scale) : codes(w.codes), values(Table16::load(w.code)) {
    values.each([&](Vector v) { return v.times(Vector::all(scale)); });
  }
  void round(Type type) {
    values.each([&](Vector v) { return rounded(v, type); });
  }
  // How many elements from `e` on of the flattened matrix belong to the run.
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
