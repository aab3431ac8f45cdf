// The loops of outer.h around tiles of up to kTall rows and kWide columns of a result, whose sums fill the registers.
//
// Both factors are copied first, into the order in which tiles read them: words of 32 bits, which are a float32 or a pair of
// bfloat16 that meet the same sum. What is copied stays in a core's caches. Everything is in an unnamed namespace: another file
// has the same names for other instructions.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 finds it in its own intrinsics (its bug 105593)
#include <immintrin.h>

#include "outer.h"
#include "table.h"

namespace trinity {
namespace {

constexpr int kTall = 14, kWide = 32;
constexpr int64_t kColumnsAtOnce = 512;

struct Floats {
  using T = float;
  static constexpr int64_t kPer = 1;  // numbers of a word
  static __m512 add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Brains {
  using T = uint16_t;
  static constexpr int64_t kPer = 2;
  static __m512 add(__m512 sum, __m512 a, __m512 b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

// Sixteen words of one step: of each column a number, or one and that of the next row (zeros: there is none).
inline __m512i words_of(const float *row, const float *, __mmask16 mask) { return _mm512_castps_si512(_mm512_maskz_loadu_ps(mask, row)); }

inline __m512i words_of(const uint16_t *row, const uint16_t *next, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  if (!next) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, next)), 16));
}

constexpr __mmask16 mask_of(int64_t num) { return num >= 16 ? 0xffff : num <= 0 ? 0 : static_cast<__mmask16>((1u << num) - 1); }

// Rows [0, num) of a matrix [.., columns], as words: `width` columns side by side, all steps; then the next columns.
template <class F>
void pack_rows(const typename F::T *at, int64_t step, int64_t num, int64_t columns, int64_t width, uint32_t *to) {
  const int64_t steps = (num + F::kPer - 1) / F::kPer;
  for (int64_t c0 = 0; c0 < columns; c0 += width) {
    const int64_t left = columns - c0 < width ? columns - c0 : width;
    for (int64_t s = 0; s < steps; s++, to += width) {
      const typename F::T *row = at + F::kPer * s * step + c0, *next = F::kPer * s + 1 < num ? row + step : nullptr;
      for (int64_t c = 0; c < width; c += 16) {
        const __m512i words = words_of(row + c, next ? next + c : nullptr, mask_of(left - c));
        _mm512_mask_storeu_epi32(to + c, mask_of(width - c), words);
      }
    }
  }
}

inline uint32_t word_of(const float *p, int64_t) {
  uint32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}

inline uint32_t word_of(const uint16_t *p, int64_t left) { return p[0] | (left > 1 ? static_cast<uint32_t>(p[1]) << 16 : 0u); }

// `height` rows of `num` numbers as words, all rows' first ones side by side, then all rows' second ones.
template <class F>
void pack_across(const typename F::T *at, int64_t step, int64_t height, int64_t num, uint32_t *to) {
  const int64_t fours = num / (4 * F::kPer) * 4, steps = (num + F::kPer - 1) / F::kPer;
  int64_t r = 0;
  for (; r + 4 <= height; r += 4) {
    const typename F::T *rows = at + r * step;
    for (int64_t s = 0; s < fours; s += 4) {
      __m128 w[4];
      for (int i = 0; i < 4; i++) w[i] = _mm_loadu_ps(reinterpret_cast<const float *>(rows + i * step + F::kPer * s));
      _MM_TRANSPOSE4_PS(w[0], w[1], w[2], w[3]);
      for (int i = 0; i < 4; i++) _mm_storeu_ps(reinterpret_cast<float *>(to + (s + i) * height + r), w[i]);
    }
  }
  const int64_t whole = r;
  for (r = 0; r < height; r++)
    for (int64_t s = r < whole ? fours : 0; s < steps; s++)
      to[s * height + r] = word_of(at + r * step + F::kPer * s, num - F::kPer * s);
}

struct Target {
  float *at;
  int64_t step;
  bool is_new;
};

template <class F, int R>
void tile(const uint32_t *a, const uint32_t *b, int64_t steps, const Target &out, __mmask16 left, __mmask16 right) {
  __m512 sums[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    __builtin_prefetch(out.at + r * out.step, 1);
    __builtin_prefetch(out.at + r * out.step + 16, 1);
  }
  for (int64_t s = 0; s < steps; s++, a += R, b += kWide) {
    const __m512 first = _mm512_loadu_ps(b), second = _mm512_loadu_ps(b + 16);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      const __m512 spread = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(a[r])));
      sums[r][0] = F::add(sums[r][0], spread, first);
      sums[r][1] = F::add(sums[r][1], spread, second);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    float *to = out.at + r * out.step;
    const __mmask16 old_left = out.is_new ? 0 : left, old_right = out.is_new ? 0 : right;
    _mm512_mask_storeu_ps(to, left, _mm512_add_ps(_mm512_maskz_loadu_ps(old_left, to), sums[r][0]));
    _mm512_mask_storeu_ps(to + 16, right, _mm512_add_ps(_mm512_maskz_loadu_ps(old_right, to + 16), sums[r][1]));
  }
}

using Tile = void (*)(const uint32_t *, const uint32_t *, int64_t, const Target &, __mmask16, __mmask16);

template <class F>
constexpr Tile kTiles[kTall + 1] = {nullptr,    tile<F, 1>,  tile<F, 2>,  tile<F, 3>,  tile<F, 4>,
                                    tile<F, 5>, tile<F, 6>,  tile<F, 7>,  tile<F, 8>,  tile<F, 9>,
                                    tile<F, 10>, tile<F, 11>, tile<F, 12>, tile<F, 13>, tile<F, 14>};

// Rows of a result in tiles that are as even as can be.
struct Tiles {
  int64_t num, rows;
  explicit Tiles(int64_t rows) : num((rows + kTall - 1) / kTall), rows(rows) {}
  int64_t begin(int64_t i) const { return rows * i / num; }
  int64_t height(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Memory that is read next, fetched some lines at a time beside the arithmetic. It may end before: to fetch harms nobody.
struct Ahead {
  const char *at, *end;
  void fetch() {
    for (int i = 0; i < kTall && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// out [m, n] += a b, with b [k, n] as rows; `pack_a(tile, k0, num, to)` makes the words of a tile's factors k0 and so on.
template <class F, class PackA>
void product_of(const Tiles &tiles, const typename F::T *b, int64_t b_step, int64_t k, int64_t n, Target out, PackA pack_a) {
  const int64_t most = kRun * F::kPer, wide = n < kColumnsAtOnce ? (n + kWide - 1) / kWide * kWide : kColumnsAtOnce;
  uint32_t *const a_words = static_cast<uint32_t *>(scratch(0, 4 * kRun * (tiles.rows + wide)));
  uint32_t *const b_words = a_words + kRun * tiles.rows;
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += most) {  // once without any: zeros
    const int64_t num = k - k0 < most ? k - k0 : most, steps = (num + F::kPer - 1) / F::kPer;
    const bool is_new = out.is_new && k0 == 0;
    for (int64_t i = 0; i < tiles.num; i++) pack_a(i, k0, num, a_words + steps * tiles.begin(i));
    const typename F::T *const next = b + (k0 + most) * b_step;
    Ahead ahead{reinterpret_cast<const char *>(next), reinterpret_cast<const char *>(next + most * b_step)};
    for (int64_t n0 = 0; n0 < n; n0 += wide) {
      const int64_t columns = n - n0 < wide ? n - n0 : wide;
      pack_rows<F>(b + k0 * b_step + n0, b_step, num, columns, kWide, b_words);
      for (int64_t c = 0; c < columns; c += kWide)
        for (int64_t i = 0; i < tiles.num; i++) {
          ahead.fetch();
          const Target to{out.at + tiles.begin(i) * out.step + n0 + c, out.step, is_new};
          kTiles<F>[tiles.height(i)](a_words + steps * tiles.begin(i), b_words + steps * c, steps, to, mask_of(columns - c),
                                     mask_of(columns - c - 16));
        }
    }
  }
}

template <class F>
void add_products_as(const AddedProducts &p, int64_t units, int64_t first, int64_t last) {
  using T = typename F::T;
  for (int64_t u = first; u < last; u++) {
    const int64_t e = u / units, lo = (e ? p.end[e - 1] : 0) + u % units * kUnitRows;
    if (lo >= p.end[e]) continue;
    const Tiles tiles(p.end[e] - lo < kUnitRows ? p.end[e] - lo : kUnitRows);
    const T *rows = static_cast<const T *>(p.p) + lo * p.p_step;
    product_of<F>(tiles, static_cast<const T *>(p.v) + e * p.k * p.n, p.n, p.k, p.n, {p.out + lo * p.n, p.n, p.is_new},
                  [&](int64_t i, int64_t k0, int64_t num, uint32_t *to) {
                    pack_across<F>(rows + tiles.begin(i) * p.p_step + k0, p.p_step, tiles.height(i), num, to);
                  });
  }
}

template <class F>
void add_row_sums_as(const RowSums &s, int64_t units, int64_t first, int64_t last) {
  using T = typename F::T;
  for (int64_t u = first; u < last; u++) {
    const int64_t e = u / units, from = u % units * kUnitRows, lo = e ? s.end[e - 1] : 0;
    if (lo == s.end[e] && !s.is_new) continue;
    const Tiles tiles(s.a_width - from < kUnitRows ? s.a_width - from : kUnitRows);
    const T *a = static_cast<const T *>(s.a) + lo * s.a_step + from, *b = static_cast<const T *>(s.b) + lo * s.b_step;
    const Target out{s.out + (e * s.a_width + from) * s.b_width, s.b_width, s.is_new};
    product_of<F>(tiles, b, s.b_step, s.end[e] - lo, s.b_width, out, [&](int64_t i, int64_t k0, int64_t num, uint32_t *to) {
      const int64_t height = tiles.height(i);
      pack_rows<F>(a + k0 * s.a_step + tiles.begin(i), s.a_step, num, height, height, to);
    });
  }
}

}  // namespace
}  // namespace trinity
