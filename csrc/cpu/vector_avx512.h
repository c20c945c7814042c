// Sixteen floats in a register of AVX-512.
struct Vector {
  static constexpr int LANES = 16, TILE_ROWS = 12, DOT_ROWS = 6, DOT_COLS = 4;
  __m512 v;

  static Vector zero() { return {_mm512_setzero_ps()}; }
  static Vector all(float x) { return {_mm512_set1_ps(x)}; }
  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vector load(const BF16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Vector load(const F16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  static Vector load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  static Vector load(const E4M3* p) {
    const __m256i codes =
        _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
    const __m256i absolute = _mm256_and_si256(codes, _mm256_set1_epi16(0x3F80));
    const __m256i nan = _mm256_cmpeq_epi16(absolute, _mm256_set1_epi16(0x3F80));
    const __m256i bits =
        _mm256_or_si256(_mm256_and_si256(codes, _mm256_set1_epi16(short(0xBF80))), nan);
    return {_mm512_mul_ps(_mm512_cvtph_ps(bits), _mm512_set1_ps(256.0f))};
  }
  template <class T>
  static void load_two(const T* p, Vector* out) {
    out[0] = load(p), out[1] = load(p + LANES);
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BF16* p) const {
#ifdef LORA_KERNELS_AVX512_BF16
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
    return;
#endif
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store(F16* p) const {
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  Vector multiply_add(Vector a, Vector b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }
  Vector plus(Vector b) const { return {_mm512_add_ps(v, b.v)}; }
  Vector times(Vector b) const { return {_mm512_mul_ps(v, b.v)}; }
  float sum() const {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }

  static __m512d pd(__m512 x) { return _mm512_castps_pd(x); }

  // r[i] lane j <-> r[j] lane i.
  static void transpose(Vector* r) {
    __m512 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    __m512 u[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(t[i]), pd(t[i + 2])));
      u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(t[i]), pd(t[i + 2])));
      u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(t[i + 1]), pd(t[i + 3])));
      u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(t[i + 1]), pd(t[i + 3])));
    }
    // u[4g + i] holds, in 128-bit part q, column 4q + i of rows 4g .. 4g + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
      const __m512 b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
      const __m512 c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xDD);
      const __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xDD);
      r[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
      r[i + 8].v = _mm512_shuffle_f32x4(a, b, 0xDD);
      r[i + 4].v = _mm512_shuffle_f32x4(c, d, 0x88);
      r[i + 12].v = _mm512_shuffle_f32x4(c, d, 0xDD);
    }
  }
};

// Words of 32 bits, each in the low half of 64: the upper halves may hold anything.
struct Words {
  static constexpr int LANES = 8;
  __m512i v;

  static Words all(uint32_t x) { return {_mm512_set1_epi64(x)}; }
  // first .. first + 7, in the order that `factors` needs.
  static Words counters(uint64_t first) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    return {_mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), order)};
  }
  Words times(Words b) const { return {_mm512_mul_epu32(v, b.v)}; }  // 64 bits
  Words high() const { return {_mm512_srli_epi64(v, 32)}; }
  // The exclusive or of three.
  Words exclusive_or(Words b, Words c) const {
    return {_mm512_ternarylogic_epi64(v, b.v, c.v, 0x96)};
  }
  // `scale`, or 0 where a word is below the threshold, of w[0] to w[3] of one counter after the
  // other.
  static void factors(const Words (&w)[4], uint32_t threshold, float scale, Vector (&out)[2]) {
    const __m512i least = _mm512_set1_epi32(int32_t(threshold));
    const __m512i front = beside(w[0], w[1]), back = beside(w[2], w[3]);
    const __m512i low = _mm512_unpacklo_epi64(front, back);
    const __m512i high = _mm512_unpackhi_epi64(front, back);
    const __m512 all = _mm512_set1_ps(scale);
    out[0].v = _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(low, least), all);
    out[1].v = _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(high, least), all);
  }

 private:
  static __m512i beside(Words low, Words high) {
    return _mm512_mask_blend_epi32(0xAAAA, low.v, _mm512_slli_epi64(high.v, 32));
  }
};

// Sixteen floats that are looked up by four bits.
struct Table16 {
  Vector all;

  static Table16 load(const float* p) { return {Vector::load(p)}; }
  void store(float* p) const { all.store(p); }
  template <class F>
  void each(const F& f) {
    all = f(all);
  }
  // The values of 16 codes in 8 bytes, the high four bits of a byte first.
  Vector at(const uint8_t* p) const {
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    const __m512i twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    const __m512i shift = _mm512_set1_epi64(4);  // of the first of a pair
    return {_mm512_permutexvar_ps(_mm512_srlv_epi32(twice, shift), all.v)};
  }
};

// The values of 64 codes in 32 bytes, half of them at a time.
template <int>
struct Groups16 {
  Vector all;

  explicit Groups16(const Quantized& w) : all(Vector::load(w.code)) {}
  // The element of the group that is decoded as number i: of 16 bytes the even ones, then the odd.
  static constexpr int64_t order(int64_t i) { return i / 32 * 32 + 2 * (i % 16) + i / 16 % 2; }
  template <int WHICH>
  void half(const uint8_t* p, Vector* out) const {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 16 * WHICH)));
    out[0] = {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), all.v)};
    out[1] = {_mm512_permutexvar_ps(codes, all.v)};
  }
};
