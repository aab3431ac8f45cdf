// For x86 with AVX512 (F, BW, DQ, VL) that has neither products of bfloat16 nor of bytes.
#include "avx512.inl"

namespace trinity {
namespace {

inline __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

struct BrainFormat : BrainLanes {
  static Sum add(Sum s, Weight w, Row x) {
    return _mm512_fmadd_ps(first_of(w), first_of(x), _mm512_fmadd_ps(second_of(w), second_of(x), s));
  }
};

struct ByteFormat : ByteParts {
  using X = uint8_t;
  using W = int8_t;
  using Total = int32_t;
  using Sum = __m512i;
  using Row = __m512i;  // widened to 16 bits: products of pairs of bytes would not fit those
  using Weight = __m512i;
  using Mode = AsUsual;
  static constexpr int kRows = 4, kStep = 32, kFew = 1, kAhead = 8 << 10;
  static constexpr bool kPads = true, kRounds = false;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Row load_x(const uint8_t *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
  static Weight load_w(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
  static Row load_x(const uint8_t *p, int num) { return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((1u << num) - 1, p)); }
  static Weight load_w(const int8_t *p, int num) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8((1u << num) - 1, p)); }
  static Sum add(Sum s, Weight w, Row x) { return _mm512_add_epi32(s, _mm512_madd_epi16(w, x)); }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], int32_t *out) { _mm512_store_ps(out, added_up<Ints, R>(sums)); }
};

}  // namespace
}  // namespace trinity

#include "tiles.inl"

namespace trinity {
const Table kAvx512 = {round_rows_here, multiply_here, feed_forward_here};
}  // namespace trinity
