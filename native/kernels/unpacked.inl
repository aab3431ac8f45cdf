// Matrices in 8 or 4 bits with scales, as float32: four weight rows at a time, which stay in the nearest cache while all rows pass
// by. A number is value * scale, rounded once; products are float32's. Included by tiles.inl.

struct Fp8Format : FloatFormat {};
struct Nvfp4Format : FloatFormat {};

constexpr int64_t kScaled = 128;  // numbers that share a scale of fp8, along both sides
constexpr int64_t kGroup = 16;    // and of nvfp4, along a row

constexpr float kE2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

inline float e4m3(uint8_t byte) {
  const uint32_t bits = byte & 0x7f, sign = static_cast<uint32_t>(byte & 0x80) << 24;
  return as_float((bits == 0x7f ? 0x7fc00000 : as_bits(as_float(bits << 20) * 0x1p120f)) | sign);
}

#if defined(__AVX512BW__)
// Sixteen numbers / 256: as float16 they have the same bits but for exponents, and no step is slow for the least of them.
inline __m512 wide_e4m3(const uint8_t *w) {
  const __m256i words = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(w))), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(0xbf80))));
}

inline bool has_nan(const uint8_t *w) {  // among 64 numbers
  const __m512i most = _mm512_set1_epi8(0x7f);
  return _mm512_cmpeq_epi8_mask(_mm512_and_si512(_mm512_loadu_si512(w), most), most);
}

inline int64_t scaled_first(const uint8_t *w, int64_t num, float scale, float *to) {
  const __m512 factor = _mm512_set1_ps(scale * 256.0f);
  int64_t i = 0;
  for (; i + 64 <= num && scale < 0x1p100f && !has_nan(w + i); i += 64)
#pragma GCC unroll 4
    for (int64_t j = i; j < i + 64; j += 16) _mm512_storeu_ps(to + j, _mm512_mul_ps(wide_e4m3(w + j), factor));
  return i;
}

inline void scaled_e2m1(const uint8_t *w, float scale, float *to) {
  int32_t low, high;
  __builtin_memcpy(&low, w, 4);
  __builtin_memcpy(&high, w + 4, 4);
  const __m512i halves = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
  const __m512i steps = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
  const __m512 values = _mm512_permutexvar_ps(_mm512_srlv_epi32(halves, steps), _mm512_loadu_ps(kE2m1));  // by the lowest 4 bits
  _mm512_storeu_ps(to, _mm512_mul_ps(values, _mm512_set1_ps(scale)));
}
#else
inline int64_t scaled_first(const uint8_t *, int64_t, float, float *) { return 0; }

inline void scaled_e2m1(const uint8_t *w, float scale, float *to) {
  for (int i = 0; i < 8; i++) to[2 * i] = kE2m1[w[i] & 15] * scale, to[2 * i + 1] = kE2m1[w[i] >> 4] * scale;
}
#endif

inline void scaled_e4m3(const uint8_t *__restrict w, int64_t num, float scale, float *__restrict to) {
  for (int64_t i = scaled_first(w, num, scale, to); i < num; i++) to[i] = e4m3(w[i]) * scale;
}

inline void unpack(Fp8Format, const Matrices &m, int64_t e, int64_t n, float *to) {
  const int64_t blocks = (m.k + kScaled - 1) / kScaled, rows = (m.n + kScaled - 1) / kScaled;
  const uint8_t *w = static_cast<const uint8_t *>(m.values) + (e * m.n + n) * m.k;
  const float *scale = m.scale + (e * rows + n / kScaled) * blocks;
  for (int64_t first = 0; first < m.k; first += kScaled)
    scaled_e4m3(w + first, m.k - first < kScaled ? m.k - first : kScaled, *scale++, to + first);
}

inline void unpack(Nvfp4Format, const Matrices &m, int64_t e, int64_t n, float *to) {
  const int64_t groups = m.k / kGroup, at = (e * m.n + n) * groups;
  const uint8_t *w = static_cast<const uint8_t *>(m.values) + at * kGroup / 2, *own = static_cast<const uint8_t *>(m.more) + at;
  float scale[64];
  for (int64_t g = 0; g < groups; g++, w += kGroup / 2, to += kGroup) {
    if (g % 64 == 0) {
      const int64_t num = groups - g < 64 ? groups - g : 64;
      scaled_e4m3(own + g, num, 1.0f, scale);
      for (int64_t i = 0; i < num; i++) scale[i] = scale[i] / m.scale[e];
    }
    scaled_e2m1(w, scale[g % 64], to);
  }
}

template <class F>
inline void unpacked_products(F, const Rows &rows, const Matrices &w, int64_t e, int64_t lo, int64_t hi, int64_t n, int64_t last,
                              float *y, int64_t y_step) {
  const int64_t size = (w.k + 15) / 16 * 16;
  float *memory = static_cast<float *>(scratch(1, kColumns * size * 4));
  Lines<FloatFormat> lines[kBlock];
  for (; n < last && n < w.n; n += kColumns) {
    Four<FloatFormat> four = {};
    four.y = y + n;
    four.apart = 1;
    four.num = static_cast<int>(w.n - n < kColumns ? w.n - n : kColumns);
    for (int c = 0; c < kColumns; c++) {
      four.w[c] = memory + (c < four.num ? c : 0) * size;
      if (c < four.num) unpack(F(), w, e, n + c, memory + c * size);
    }
    for (int64_t first = lo; first < hi; first += kBlock) {
      const int num = lines_of<FloatFormat>(rows, w.k, first, first + kBlock < hi ? first + kBlock : hi, lines);
      for (int l = 0; l < num; l++) put_some<FloatFormat>(lines[l], four, w.k, Nothing(), y_step);
    }
  }
}

inline bool repacked(Fp8Format f, const Rows &rows, const Matrices &w, int64_t e, int64_t lo, int64_t hi, int64_t n, int64_t last,
                     float *y, int64_t y_step) {
  unpacked_products(f, rows, w, e, lo, hi, n, last, y, y_step);
  return true;
}

inline bool repacked(Nvfp4Format f, const Rows &rows, const Matrices &w, int64_t e, int64_t lo, int64_t hi, int64_t n, int64_t last,
                     float *y, int64_t y_step) {
  unpacked_products(f, rows, w, e, lo, hi, n, last, y, y_step);
  return true;
}
