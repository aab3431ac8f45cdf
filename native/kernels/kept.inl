// The loops of kept.h around tiles of six rows and four weight rows: with 24 sums the rows that pass by are read less often than by
// the tiles of tiles.inl, which the including file has included, with the format. An output's sums are the same.
#include "kept.h"

namespace trinity {
namespace {

constexpr int kSix = 6, kNearRows = 48;   // rows of a tile, and those that meet four weight rows
constexpr int64_t kNearColumns = 128;     // outputs whose weights stay in a core's cache meanwhile

inline void put_four(__m512 sums, int num, float *y, int64_t y_step) {
  alignas(64) float out[16];
  _mm512_store_ps(out, sums);
  for (int r = 0; r < num; r++) __builtin_memcpy(y + r * y_step, out + 4 * r, 16);
}

#if defined(__AVX512BF16__)
inline void put_four(__m512 sums, int num, uint16_t *y, int64_t y_step) {
  alignas(32) uint16_t out[16];
  _mm256_store_si256(reinterpret_cast<__m256i *>(out), (__m256i)_mm512_cvtneps_pbh(sums));
  for (int r = 0; r < num; r++) __builtin_memcpy(y + r * y_step, out + 4 * r, 8);
}
#endif

// Up to R rows by four weight rows; what is missing are other rows, whose products are not put.
template <class F, int R>
inline void six_by_four(const typename F::X *x, int num, const typename F::W *w, int64_t k, const char *next, typename F::X *y,
                        int64_t n) {
  typename F::Sum sums[R][kColumns];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) sums[r][c] = F::zero();
  const typename F::X *rows[R];
  for (int r = 0; r < R; r++) rows[r] = x + (r < num ? r : 0) * k;
  for (int64_t i = 0; i < k; i += F::kStep) {
    i = begin_to_read(next + i * static_cast<int64_t>(sizeof(typename F::W)), i);
    typename F::Weight weights[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) weights[c] = F::load_w(w + c * k + i);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const typename F::Row row = F::load_x(rows[r] + i);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) sums[r][c] = F::add(sums[r][c], weights[c], row);
    }
  }
  put_four(added_up<Floats, R < 4 ? R : 4>(sums), num < 4 ? num : 4, y, n);
  if (R == kSix && num > 4) put_four(added_up<Floats, 2>(sums + (R == kSix ? 4 : 0)), num - 4, y + 4 * n, n);
}

// `num` rows by a matrix [n, k] in rows of k, into y [num, n].
template <class F>
void product_of(const typename F::X *x, const typename F::W *w, int64_t num, int64_t k, int64_t n, typename F::X *y) {
  typename F::Mode mode;
  for (int64_t n0 = 0; n0 < n; n0 += kNearColumns)
    for (int64_t first = 0; first < num; first += kNearRows)
      for (int64_t c = n0; c < n && c < n0 + kNearColumns; c += kColumns)
        for (int64_t r = first; r < num && r < first + kNearRows; r += kSix) {
          const int64_t left = num - r;
          const char *next = reinterpret_cast<const char *>(w + (c + kColumns + (r - first) / kSix) * k);
          const auto tile = left > 4 ? six_by_four<F, 6> : left > 2 ? six_by_four<F, 4> : left > 1 ? six_by_four<F, 2> : six_by_four<F, 1>;
          tile(x + r * k, static_cast<int>(left < kSix ? left : kSix), w + c * k, k, next, y + r * n + c, n);
        }
}

// The same of any size: what tiles above do not take goes through tiles.inl.
template <class F>
void rounded_product(const void *x_values, const void *w_values, int64_t e, int64_t lo, int64_t hi, int64_t k, int64_t n, void *y_values) {
  const auto *x = static_cast<const typename F::X *>(x_values) + lo * k;
  const auto *w = static_cast<const typename F::W *>(w_values) + e * n * k;
  auto *y = static_cast<typename F::X *>(y_values) + lo * n;
  if (k % F::kStep == 0 && n % kColumns == 0) return product_of<F>(x, w, hi - lo, k, n, y);
  float *sums = static_cast<float *>(scratch(0, (hi - lo) * n * 4));
  project<F>({x, nullptr, nullptr}, {w, nullptr, nullptr, n, k}, 0, 0, hi - lo, sums);
  round_rows_here(F::kRounds ? kBfloat16 : kFloat32, sums, hi - lo, n, y, nullptr);
}

template <class F>
void multiply_rounded_as(const RoundedProduct &p, int64_t units, int64_t first, int64_t last) {
  for (int64_t u = first; u < last; u++) {
    const int64_t e = u / units, lo = (e ? p.end[e - 1] : 0) + u % units * kSomeRows, left = p.end[e] - lo;
    if (left > 0) rounded_product<F>(p.x, p.w, e, lo, lo + (left < kSomeRows ? left : kSomeRows), p.k, p.n, p.y);
  }
}

inline float widened(float value) { return value; }
inline float widened(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }
inline void narrow(float value, float *to) { *to = value; }
inline void narrow(float value, uint16_t *to) { *to = brain_of(value); }

template <class X>
inline void gate_row(const X *__restrict gate, const X *__restrict up, float weight, int64_t f, X *__restrict hidden) {
  for (int64_t i = 0; i < f; i++) {
    const float g = widened(gate[i]);
    narrow(g / (1.0f + exp_of(-g)) * widened(up[i]) * weight, hidden + i);
  }
}

template <class F>
void forward_and_keep_as(const KeptForward &t, int64_t first, int64_t last) {
  using X = typename F::X;
  for (int64_t u = first; u < last; u++) {
    const int64_t e = t.expert[u], lo = t.begin[u], num = t.end[u] - lo;
    rounded_product<F>(t.x, t.gate, e, lo, lo + num, t.k, t.f, t.gated);
    rounded_product<F>(t.x, t.up, e, lo, lo + num, t.k, t.f, t.upped);
    const X *gate = static_cast<const X *>(t.gated) + lo * t.f, *up = static_cast<const X *>(t.upped) + lo * t.f;
    X *hidden = static_cast<X *>(scratch(1, num * t.f * static_cast<int64_t>(sizeof(X))));
    for (int64_t r = 0; r < num; r++) gate_row(gate + r * t.f, up + r * t.f, t.weight[lo + r], t.f, hidden + r * t.f);
    const X *down = static_cast<const X *>(t.down) + e * t.n * t.f;
    rounded_product<F>(hidden, down, 0, 0, num, t.f, t.n, static_cast<X *>(t.y) + lo * t.n);
  }
}

}  // namespace
}  // namespace trinity
