// AVX512: what its two files share. A sum is one register; up to sixteen of them are added up at once.
#include "bits.inl"

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

namespace trinity {
namespace {

// Lanes are added as a tree (l with l + 8, + 4, + 2, + 1), as float32 or as int32.
struct Floats {
  static __m512 of(__m512 v) { return v; }
  static __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

struct Ints {  // in registers that are named as those of floats
  static __m512 of(__m512i v) { return _mm512_castsi512_ps(v); }
  static __m512 plus(__m512 a, __m512 b) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

template <class Kind>
inline __m512 halves(__m512 a, __m512 b) {
  return Kind::plus(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

template <class Kind>
inline __m512 quarters(__m512 a, __m512 b) {
  return Kind::plus(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

template <class Kind>
inline __m512 eighths(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return Kind::plus(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

template <class Kind>
inline __m512 sixteenths(__m512 a, __m512 b) {
  return Kind::plus(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// The sums of a row's four columns, in the lanes of one register's quarters: column c in quarter c, four partial sums.
template <class Kind, class V>
inline __m512 of_row(const V *sums) {
  return quarters<Kind>(halves<Kind>(Kind::of(sums[0]), Kind::of(sums[1])), halves<Kind>(Kind::of(sums[2]), Kind::of(sums[3])));
}

template <class Kind, int R, class V>
inline __m512 added_up(const V (*sums)[kColumns]) {
  const __m512 first = of_row<Kind>(sums[0]), second = R > 1 ? of_row<Kind>(sums[R > 1 ? 1 : 0]) : first;
  __m512 pair = eighths<Kind>(first, second), other = pair;
  if (R > 2) other = eighths<Kind>(of_row<Kind>(sums[R > 2 ? 2 : 0]), of_row<Kind>(sums[R > 3 ? 3 : 0]));
  const __m512i by_row = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(by_row, sixteenths<Kind>(pair, other));
}

// A row's sums of four columns, of four tiles: part p's column c in lane 4 c + p.
template <class Kind>
inline __m512 parts_added(const __m512 *parts) {
  return sixteenths<Kind>(eighths<Kind>(parts[0], parts[1]), eighths<Kind>(parts[2], parts[3]));
}

struct FloatParts {
  using Part = __m512;
  static constexpr bool kStrips = true;
  static Part part(const __m512 *sums) { return of_row<Floats>(sums); }
  static void whole(const Part *parts, const Matrices &, int64_t, int64_t, float, float *out) {
    _mm512_store_ps(out, parts_added<Floats>(parts));
  }
};

template <class T>
inline __m512i quarters_of(const T *at, int64_t apart) {  // four numbers from each of four places
  __m512i all = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at)));
  all = _mm512_inserti32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i *>(at + apart)), 1);
  all = _mm512_inserti32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i *>(at + 2 * apart)), 2);
  return _mm512_inserti32x4(all, _mm_loadu_si128(reinterpret_cast<const __m128i *>(at + 3 * apart)), 3);
}

struct ByteParts {
  using Part = __m512;
  static constexpr bool kStrips = true;
  static Part part(const __m512i *sums) { return of_row<Ints>(sums); }
  static void whole(const Part *parts, const Matrices &m, int64_t at, int64_t apart, float scale, float *out) {
    const __m512i excess = _mm512_slli_epi32(quarters_of(static_cast<const int32_t *>(m.more) + at, apart), 7);
    const __m512i total = _mm512_sub_epi32(_mm512_castps_si512(parts_added<Ints>(parts)), excess);
    const __m512 by = _mm512_castsi512_ps(quarters_of(m.scale + at, apart));
    _mm512_store_ps(out, _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), by), _mm512_set1_ps(scale)));
  }
};

struct FloatFormat : FloatParts {
  using X = float;
  using W = float;
  using Total = float;
  using Sum = __m512;
  using Row = __m512;
  using Weight = __m512;
  using Mode = AsUsual;
  static constexpr int kRows = 4, kStep = 16, kFew = 4, kAhead = 0;
  static constexpr bool kPads = false, kRounds = false;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Row load_x(const float *p) { return _mm512_loadu_ps(p); }
  static Weight load_w(const float *p) { return _mm512_loadu_ps(p); }
  static Sum add(Sum s, Weight w, Row x) { return _mm512_fmadd_ps(w, x, s); }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], float *out) { _mm512_store_ps(out, added_up<Floats, R>(sums)); }
};

// A format of bfloat16 but for its products.
struct BrainLanes : FloatParts {
  using X = uint16_t;
  using W = uint16_t;
  using Total = float;
  using Sum = __m512;
  using Row = __m512i;
  using Weight = __m512i;
  using Mode = Flushing;  // vdpbf16ps does so anyway, adding up lanes does not
  static constexpr int kRows = 4, kStep = 32, kFew = 3, kAhead = 8 << 10;
  static constexpr bool kPads = true, kRounds = true;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Row load_x(const uint16_t *p) { return _mm512_loadu_si512(p); }
  static Weight load_w(const uint16_t *p) { return _mm512_loadu_si512(p); }
  static Row load_x(const uint16_t *p, int num) { return _mm512_maskz_loadu_epi16((1u << num) - 1, p); }
  static Weight load_w(const uint16_t *p, int num) { return load_x(p, num); }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], float *out) { _mm512_store_ps(out, added_up<Floats, R>(sums)); }
};

}  // namespace
}  // namespace trinity
