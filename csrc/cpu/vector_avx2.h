// Eight floats in a register of AVX2 with FMA and F16C.
struct Vector {
  static constexpr int LANES = 8, TILE_ROWS = 6, DOT_ROWS = 4, DOT_COLS = 3;
  __m256 v;

  static Vector zero() { return {_mm256_setzero_ps()}; }
  static Vector all(float x) { return {_mm256_set1_ps(x)}; }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vector load(const BF16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vector load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static Vector load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  static Vector load(const E4M3* p) {
    const __m128i codes = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7);
    const __m128i absolute = _mm_and_si128(codes, _mm_set1_epi16(0x3F80));
    const __m128i nan = _mm_cmpeq_epi16(absolute, _mm_set1_epi16(0x3F80));
    const __m128i bits = _mm_or_si128(_mm_and_si128(codes, _mm_set1_epi16(short(0xBF80))), nan);
    return {_mm256_mul_ps(_mm256_cvtph_ps(bits), _mm256_set1_ps(256.0f))};
  }
  // The values of 16 codes in `out[0]` and `out[1]`: fewer instructions than two of `load`.
  static void load_two(const int8_t* p, Vector* out) { out[0] = load(p), out[1] = load(p + 8); }
  static void load_two(const E4M3* p, Vector* out) {
    const __m256i codes =
        _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    const __m256i absolute = _mm256_and_si256(codes, _mm256_set1_epi16(0x3F80));
    const __m256i nan = _mm256_cmpeq_epi16(absolute, _mm256_set1_epi16(0x3F80));
    const __m256i bits =
        _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi16(short(0xBF80))), nan);
    const Vector factor = all(256.0f);
    out[0] = Vector{_mm256_cvtph_ps(_mm256_castsi256_si128(bits))}.times(factor);
    out[1] = Vector{_mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1))}.times(factor);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BF16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7FC00000), nan);
    const __m256i high = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high),
                                                   _mm256_extracti128_si256(high, 1)));
  }
  void store(F16* p) const {
    _mm_storeu_si128((__m128i*)p,
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  Vector multiply_add(Vector a, Vector b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
  Vector plus(Vector b) const { return {_mm256_add_ps(v, b.v)}; }
  Vector times(Vector b) const { return {_mm256_mul_ps(v, b.v)}; }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }

  // r[i] lane j <-> r[j] lane i.
  static void transpose(Vector* r) {
    __m256 t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }
};

// Words of 32 bits, each in the low half of 64: the upper halves may hold anything.
struct Words {
  static constexpr int LANES = 4;
  __m256i v;

  static Words all(uint32_t x) { return {_mm256_set1_epi64x(x)}; }
  // first .. first + 3, in the order that `factors` needs.
  static Words counters(uint64_t first) {
    const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);
    return {_mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), order)};
  }
  Words times(Words b) const { return {_mm256_mul_epu32(v, b.v)}; }  // 64 bits
  Words high() const { return {_mm256_srli_epi64(v, 32)}; }
  // The exclusive or of three.
  Words exclusive_or(Words b, Words c) const {
    return {_mm256_xor_si256(_mm256_xor_si256(v, b.v), c.v)};
  }
  // `scale`, or 0 where a word is below the threshold, of w[0] to w[3] of one counter after the
  // other.
  static void factors(const Words (&w)[4], uint32_t threshold, float scale, Vector (&out)[2]) {
    const __m256i front = beside(w[0], w[1]), back = beside(w[2], w[3]);
    out[0] = factor(_mm256_unpacklo_epi64(front, back), threshold, scale);
    out[1] = factor(_mm256_unpackhi_epi64(front, back), threshold, scale);
  }

 private:
  static __m256i beside(Words low, Words high) {
    return _mm256_blend_epi32(low.v, _mm256_slli_epi64(high.v, 32), 0xAA);
  }
  static Vector factor(__m256i word, uint32_t threshold, float scale) {
    const __m256i most = _mm256_max_epu32(word, _mm256_set1_epi32(int32_t(threshold)));
    const __m256 keep = _mm256_castsi256_ps(_mm256_cmpeq_epi32(most, word));
    return {_mm256_and_ps(keep, _mm256_set1_ps(scale))};
  }
};

// Sixteen floats that are looked up by four bits.
struct Table16 {
  Vector low, high;

  static Table16 load(const float* p) { return {Vector::load(p), Vector::load(p + 8)}; }
  void store(float* p) const { low.store(p), high.store(p + 8); }
  template <class F>
  void each(const F& f) {
    low = f(low), high = f(high);
  }
  // The values of 8 codes in 4 bytes, the high four bits of a byte first.
  Vector at(const uint8_t* p) const {
    uint32_t eight;
    std::memcpy(&eight, p, 4);
    const __m256i codes = _mm256_set1_epi32(eight);
    const __m256i low_bits = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    const __m256i high_bit = _mm256_setr_epi32(24, 28, 16, 20, 8, 12, 0, 4);  // to the sign
    const __m256i index = _mm256_srlv_epi32(codes, low_bits);
    const __m256i upper = _mm256_sllv_epi32(codes, high_bit);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low.v, index),
                             _mm256_permutevar8x32_ps(high.v, index), _mm256_castsi256_ps(upper))};
  }
};

// The values of 64 codes in 32 bytes, half of them at a time: by their four bytes, which takes
// fewer shuffles than `Table16` does; beside halves by the upper three, to a relative 2^-17.
template <int BYTES>
struct Groups16 {
  __m256i bytes[4];  // byte i of each of the sixteen floats, twice

  explicit Groups16(const Quantized& w) {
    for (int i = 4 - BYTES; i < 4; ++i) {
      uint8_t of_each[16];
      for (int j = 0; j < 16; ++j) {
        uint32_t bits;
        std::memcpy(&bits, w.code + j, 4);
        const bool finite = (bits & 0x7F800000) != 0x7F800000;
        if (BYTES == 3 && finite) bits += 0x80;
        of_each[j] = uint8_t(bits >> 8 * i);
      }
      bytes[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)of_each));
    }
  }
  // The element of the group that is decoded as number i: first the even ones, then the odd ones.
  static constexpr int64_t order(int64_t i) {
    const int64_t vector = i / 8 % 4, lane = i % 8;
    return 2 * (4 * vector + lane % 4 + 16 * (lane / 4)) + i / 32;
  }
  template <int WHICH>
  void half(const uint8_t* p, Vector* out) const {
    __m256i codes = _mm256_loadu_si256((const __m256i*)p);
    if constexpr (WHICH == 0) codes = _mm256_srli_epi16(codes, 4);
    codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    const __m256i b0 = BYTES == 4 ? _mm256_shuffle_epi8(bytes[0], codes) : _mm256_setzero_si256();
    const __m256i b1 = _mm256_shuffle_epi8(bytes[1], codes);
    const __m256i b2 = _mm256_shuffle_epi8(bytes[2], codes);
    const __m256i b3 = _mm256_shuffle_epi8(bytes[3], codes);
    const __m256i low0 = _mm256_unpacklo_epi8(b0, b1), high0 = _mm256_unpacklo_epi8(b2, b3);
    const __m256i low1 = _mm256_unpackhi_epi8(b0, b1), high1 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, high0))};
    out[1] = {_mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, high0))};
    out[2] = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low1, high1))};
    out[3] = {_mm256_castsi256_ps(_mm256_unpackhi_epi16(low1, high1))};
  }
};
