// For x86 with AVX2 and FMA: sixteen lanes are two registers.
#include "bits.inl"

#include <immintrin.h>

namespace trinity {
namespace {

struct Floats {
  __m256 low, high;
};

struct Pairs {  // of bfloat16
  __m256i low, high;
};

inline float added(Floats s) {
  const __m256 eight = _mm256_add_ps(s.low, s.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline int32_t added(__m256i eight) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

template <int R, class Sum, class Total>
inline void all_added(const Sum (*sums)[kColumns], Total *out) {
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kColumns; c++) out[4 * r + c] = added(sums[r][c]);
}

struct FloatFormat {
  using X = float;
  using W = float;
  using Total = float;
  using Sum = Floats;
  using Row = Floats;
  using Weight = Floats;
  using Mode = AsUsual;
  static constexpr int kRows = 1, kStep = 16, kFew = 4, kAhead = 0;
  static constexpr bool kStrips = false, kPads = false, kRounds = false;
  static Sum zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Row load_x(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Weight load_w(const float *p) { return load_x(p); }
  static Sum add(Sum s, Weight w, Row x) {
    return {_mm256_fmadd_ps(w.low, x.low, s.low), _mm256_fmadd_ps(w.high, x.high, s.high)};
  }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], float *out) { all_added<R>(sums, out); }
};

inline __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline __m256 second_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}

struct BrainFormat {
  using X = uint16_t;
  using W = uint16_t;
  using Total = float;
  using Sum = Floats;
  using Row = Pairs;
  using Weight = Pairs;
  using Mode = Flushing;
  static constexpr int kRows = 1, kStep = 32, kFew = 8, kAhead = 0;
  static constexpr bool kStrips = false, kPads = true, kRounds = true;
  static Sum zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Row load_x(const uint16_t *p) {
    const __m256i *at = reinterpret_cast<const __m256i *>(p);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static Row load_x(const uint16_t *p, int num) {
    uint16_t some[kStep] = {};
    __builtin_memcpy(some, p, static_cast<unsigned>(num) * sizeof *p);
    return load_x(some);
  }
  static Weight load_w(const uint16_t *p) { return load_x(p); }
  static Weight load_w(const uint16_t *p, int num) { return load_x(p, num); }
  static __m256 add_pairs(__m256 sum, __m256i w, __m256i x) {
    return _mm256_fmadd_ps(first_of(w), first_of(x), _mm256_fmadd_ps(second_of(w), second_of(x), sum));
  }
  static Sum add(Sum s, Weight w, Row x) { return {add_pairs(s.low, w.low, x.low), add_pairs(s.high, w.high, x.high)}; }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], float *out) { all_added<R>(sums, out); }
};

struct ByteFormat {
  using X = uint8_t;
  using W = int8_t;
  using Total = int32_t;
  using Sum = __m256i;
  using Row = __m256i;  // widened to 16 bits: products of pairs of bytes would not fit those
  using Weight = __m256i;
  using Mode = AsUsual;
  static constexpr int kRows = 2, kStep = 16, kFew = 8, kAhead = 0;
  static constexpr bool kStrips = false, kPads = true, kRounds = false;
  static Sum zero() { return _mm256_setzero_si256(); }
  static Row load_x(const uint8_t *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
  static Weight load_w(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
  static Row load_x(const uint8_t *p, int num) {
    uint8_t some[kStep] = {};
    __builtin_memcpy(some, p, static_cast<unsigned>(num));
    return load_x(some);
  }
  static Weight load_w(const int8_t *p, int num) {
    int8_t some[kStep] = {};
    __builtin_memcpy(some, p, static_cast<unsigned>(num));
    return load_w(some);
  }
  static Sum add(Sum s, Weight w, Row x) { return _mm256_add_epi32(s, _mm256_madd_epi16(w, x)); }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], int32_t *out) { all_added<R>(sums, out); }
};

}  // namespace
}  // namespace trinity

#include "tiles.inl"

namespace trinity {
const Table kAvx2 = {round_rows_here, multiply_here, feed_forward_here};
}  // namespace trinity
