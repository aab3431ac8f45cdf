// Many rows by int8: weights are packed into strips of 32 outputs, four inputs of each side by side, so that an output is a lane
// and no lanes are added up. Sums of whole numbers have one value in any order.
namespace trinity {
namespace {

constexpr int kStrip = 32;      // outputs, which eight rows meet at once
constexpr int64_t kPacked = 8;  // rows that are worth the packing

struct Strip {
  const int32_t *values;  // [K / 4, 32]: four int8 each
  __m512i excess[2];
  __m512 scale[2];
  __mmask16 there[2];
};

// Sixteen registers as rows of a matrix of 16 x 16 become its columns.
inline void turn(__m512i *r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88), t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88), t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

inline void pack(const int8_t *w, int64_t num, int64_t k, int32_t *to) {  // up to sixteen weight rows; zeros for what is missing
  for (int64_t i = 0; i < k; i += 64) {
    const int words = static_cast<int>(k - i < 64 ? (k - i) / 4 : 16);
    __m512i rows[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) rows[r] = _mm512_maskz_loadu_epi32(r < num ? (1u << words) - 1 : 0, w + r * k + i);
    turn(rows);
    for (int g = 0; g < words; g++, to += kStrip) _mm512_store_si512(to, rows[g]);
  }
}

inline Strip strip_of(const Matrices &m, int64_t expert, int64_t n, int32_t *memory) {
  Strip strip;
  strip.values = memory;
  for (int half = 0; half < 2; half++) {
    const int64_t first = n + 16 * half, left = m.n - first, num = left < 0 ? 0 : left < 16 ? left : 16, at = expert * m.n + first;
    strip.there[half] = static_cast<__mmask16>((1u << num) - 1);
    const int32_t *totals = static_cast<const int32_t *>(m.more) + at;
    strip.excess[half] = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(strip.there[half], totals), 7);
    strip.scale[half] = _mm512_maskz_loadu_ps(strip.there[half], m.scale + at);
    pack(static_cast<const int8_t *>(m.values) + at * m.k, num, m.k, memory + 16 * half);
  }
  return strip;
}

template <int R>
inline void meet(const uint8_t *const *x, const float *scale, const Strip &strip, int64_t k, float *y, int64_t y_step,
                 const char *ahead) {
  __m512i sums[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
  const int32_t *w = strip.values;
  for (int64_t i = 0; i < k; i += 4, w += kStrip) {
    i = begin_to_read(ahead + kStrip * i, begin_to_read(ahead + kStrip * i + 64, i));
    const __m512i first = _mm512_load_si512(w), second = _mm512_load_si512(w + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      int32_t four;
      __builtin_memcpy(&four, x[r] + i, 4);
      const __m512i row = _mm512_set1_epi32(four);
      sums[r][0] = ByteFormat::add(sums[r][0], first, row);
      sums[r][1] = ByteFormat::add(sums[r][1], second, row);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++, y += y_step)
    for (int half = 0; half < 2; half++) {
      const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][half], strip.excess[half]));
      const __m512 out = _mm512_mul_ps(_mm512_mul_ps(total, strip.scale[half]), _mm512_set1_ps(scale[r]));
      _mm512_mask_storeu_ps(y + 16 * half, strip.there[half], out);
    }
}

template <int R>
inline void meet_rows(const Rows &rows, int64_t first, const Strip &strip, int64_t k, float *y, int64_t y_step, const char *ahead) {
  const uint8_t *x[R];
  float scale[R];
  for (int r = 0; r < R; r++) {
    const int64_t at = rows.at ? rows.at[first + r] : first + r;
    x[r] = static_cast<const uint8_t *>(rows.values) + at * k;
    scale[r] = rows.scale[at];
  }
  meet<R>(x, scale, strip, k, y + first * y_step, y_step, ahead);
}

inline bool repacked(ByteFormat, const Rows &rows, const Matrices &w, int64_t e, int64_t lo, int64_t hi, int64_t n, int64_t last,
                     float *y, int64_t y_step) {
  if (hi - lo < kPacked || w.k % 4) return false;
  int32_t *memory = static_cast<int32_t *>(scratch(1, w.k * kStrip));
  for (; n < last && n < w.n; n += kStrip) {
    const Strip strip = strip_of(w, e, n, memory);
    const char *here = static_cast<const char *>(w.values) + (e * w.n + n) * w.k, *ahead = here + kStrip * w.k;
    for (int64_t a = lo; a < hi; ahead = here) {  // the next strip begins to be read while the first rows meet this one
      const int64_t left = hi - a;
      if (left >= 8) meet_rows<8>(rows, a, strip, w.k, y + n, y_step, ahead), a += 8;
      else if (left >= 4) meet_rows<4>(rows, a, strip, w.k, y + n, y_step, ahead), a += 4;
      else if (left >= 2) meet_rows<2>(rows, a, strip, w.k, y + n, y_step, ahead), a += 2;
      else meet_rows<1>(rows, a, strip, w.k, y + n, y_step, ahead), a += 1;
    }
  }
  return true;
}

}  // namespace
}  // namespace trinity
