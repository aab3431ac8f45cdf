// The loops around tiles of up to four rows and four weight rows, for the formats that the including file has defined:
// FloatFormat, BrainFormat and ByteFormat, each with
//   X, W: elements of rows and weights; Total: what sums are; kStep: elements of a step; kRows: most rows of a tile, 1, 2 or 4;
//   kFew: rows with which reading the weights is what takes time; kAhead: see `put_all`;
//   Sum zero(), Row/Weight load_x(p), load_w(p), load_x(p, left), load_w(p, left) with zeros for what is missing,
//   add(sum, weight, row), and totals(sums[R][4], out): out[4 * row + column];
//   where kStrips: Part part(sums[4]), and whole(parts[4], ..): out[4 * column + part].
// Everything is in an unnamed namespace: another file has the same names for other instructions.

namespace trinity {
namespace {

constexpr int kStripRows = 3;  // most of a strip: with four, a tile's lanes are as many as are added up at once
constexpr int kBlock = 64;  // rows that pass by a tile's weights, which stay in the nearest cache

template <class F>
struct Four {  // weight rows, the first one `apart` from the second and so on; the last there is again for what is missing
  const typename F::W *w[kColumns];
  float *y;  // where the first one's product with row 0 goes
  int64_t apart;
  int num;
  alignas(64) float scale[16];     // four times over: of each row of a tile
  alignas(64) int32_t excess[16];  // of totals of uint8 that are int8 + 128
};

template <class F>
struct Lines {  // up to F::kRows rows
  const typename F::X *x[4];
  int64_t first;
  int num;
  alignas(64) float scale[16];  // each four times in turn
};

template <class F>
constexpr int kStepBytes = F::kStep * sizeof(typename F::W);

// What begins to be read at each step of a tile: nothing; some lines from `at` on; what is `ahead` bytes further on in weight rows.
struct Nothing {
  template <class W>
  int64_t begin(const W *const *, int64_t i) { return i; }
};

template <int kBytes>
struct Following {
  const char *at;
  template <class W>
  int64_t begin(const W *const *, int64_t i) {
#pragma GCC unroll 2
    for (int line = 0; line < kBytes; line += 64) i = begin_to_read(at + line, i);
    at += kBytes;
    return i;
  }
};

template <int kFrom, int kTo>
struct Beside {
  int64_t ahead;
  template <class W>
  int64_t begin(const W *const *w, int64_t i) {
#pragma GCC unroll 4
    for (int c = kFrom; c < kTo; c++) i = begin_to_read(reinterpret_cast<const char *>(w[c] + i) + ahead, i);
    return i;
  }
};

template <class F, int R, class Next>
inline void add_all(const typename F::X *const *x, const typename F::W *const *w, int64_t k, Next next,
                    typename F::Sum (*sums)[kColumns]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) sums[r][c] = F::zero();
  const int64_t whole = k / F::kStep * F::kStep;
  for (int64_t i = 0; i < whole; i += F::kStep) {
    i = next.begin(w, i);
    typename F::Row rows[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) rows[r] = F::load_x(x[r] + i);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) {
      const typename F::Weight weight = F::load_w(w[c] + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[r][c] = F::add(sums[r][c], weight, rows[r]);
    }
  }
  if constexpr (F::kPads) {
    const int left = static_cast<int>(k - whole);
    for (int c = 0; c < kColumns && left; c++) {
      const typename F::Weight weight = F::load_w(w[c] + whole, left);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[r][c] = F::add(sums[r][c], weight, F::load_x(x[r] + whole, left));
    }
  }
}

template <class F, int R, class Next>
inline void tile(const typename F::X *const *x, const typename F::W *const *w, int64_t k, Next next, typename F::Total *out) {
  typename F::Sum sums[R][kColumns];
  add_all<F, R>(x, w, k, next, sums);
  F::template totals<R>(sums, out);
  if constexpr (!F::kPads)  // one by one, after the others
    for (int64_t i = k / F::kStep * F::kStep; i < k; i++)
      for (int c = 0; c < kColumns; c++)
        for (int r = 0; r < R; r++) out[4 * r + c] = __builtin_fmaf(w[c][i], x[r][i], out[4 * r + c]);
}

// What is in a loop's registers stays there in functions of their own: of one large function GCC 12 keeps sums in memory.
#define TRINITY_APART __attribute__((noinline))

template <class F>
inline void finish(const float *total, const Four<F> &, const Lines<F> &, float *out) {
  __builtin_memcpy(out, total, 16 * sizeof *out);
}

template <class F>
inline void finish(const int32_t *total, const Four<F> &four, const Lines<F> &lines, float *out) {
  for (int i = 0; i < 16; i++) out[i] = static_cast<float>(total[i] - four.excess[i]) * four.scale[i] * lines.scale[i];
}

template <class F, int R, class Next>
inline void put(const Lines<F> &lines, const Four<F> &four, int64_t k, Next next, int64_t y_step) {
  alignas(64) typename F::Total total[16] = {};
  alignas(64) float out[16];
  tile<F, R>(lines.x, four.w, k, next, total);
  finish(total, four, lines, out);
  float *y = four.y + lines.first * y_step;
#pragma GCC unroll 4
  for (int r = 0; r < R; r++, y += y_step) {
    if (four.num == kColumns && four.apart == 1) __builtin_memcpy(y, out + 4 * r, 4 * sizeof *y);
    else
      for (int c = 0; c < four.num; c++) y[c * four.apart] = out[4 * r + c];
  }
}

// Rows [first, last), at most kBlock, in groups of what a tile takes -> their number.
template <class F>
inline int lines_of(const Rows &rows, int64_t k, int64_t first, int64_t last, Lines<F> *lines) {
  int num = 0;
  for (int64_t a = first; a < last; a += lines[num++].num) {
    const int64_t left = last - a;
    Lines<F> &some = lines[num];
    some.first = a;
    some.num = static_cast<int>(left < F::kRows ? left : F::kRows);
    for (int r = 0; r < some.num; r++) {
      const int64_t at = rows.at ? rows.at[a + r] : a + r;
      some.x[r] = static_cast<const typename F::X *>(rows.values) + at * k;
      for (int c = 0; c < kColumns; c++) some.scale[4 * r + c] = rows.scale ? rows.scale[at] : 1.0f;
    }
  }
  return num;
}

template <class F, int R, int kFrom, int kTo>
TRINITY_APART void put(const Lines<F> &lines, const Four<F> &four, int64_t k, Beside<kFrom, kTo> next, int64_t y_step) {
  put<F, R, Beside<kFrom, kTo>>(lines, four, k, next, y_step);
}

template <class F, class Next>
inline void put_some(const Lines<F> &lines, const Four<F> &four, int64_t k, Next next, int64_t y_step) {
  if (lines.num == F::kRows) put<F, F::kRows>(lines, four, k, next, y_step);
  else if (lines.num == 3) put<F, F::kRows < 3 ? 1 : 3>(lines, four, k, next, y_step);
  else if (lines.num == 2) put<F, F::kRows < 2 ? 1 : 2>(lines, four, k, next, y_step);
  else put<F, 1>(lines, four, k, next, y_step);
}

// All lines by four weight rows, while what comes next begins to be read: with few lines what is `F::kAhead` further on in each
// weight row, else the next four.
template <class F>
inline void put_all(const Lines<F> *lines, int num, const Four<F> &four, int64_t k, int64_t y_step) {
  constexpr int step = kStepBytes<F>;
  const int64_t size = k * static_cast<int64_t>(sizeof(typename F::W));
  const char *next = reinterpret_cast<const char *>(four.w[0]) + kColumns * size;
  for (int l = 0; l < num; l++) {
    if (four.apart != 1 || l >= 4 || (num < 4 && l >= 2)) put_some<F>(lines[l], four, k, Nothing(), y_step);
    else if (num >= 4) put_some<F>(lines[l], four, k, Following<step>{next + l * size}, y_step);
    else if (!F::kAhead) put_some<F>(lines[l], four, k, Following<2 * step>{next + 2 * l * size}, y_step);
    else if (num == 1) put_some<F>(lines[l], four, k, Beside<0, 4>{F::kAhead}, y_step);
    else if (l == 0) put_some<F>(lines[l], four, k, Beside<0, 2>{F::kAhead}, y_step);
    else put_some<F>(lines[l], four, k, Beside<2, 4>{F::kAhead}, y_step);
  }
}

// Four weight rows of an expert for `num` rows: side by side, where the next ones are read ahead; with few rows a quarter of the
// matrix apart, because memory is then read two to three times as fast. Row 0's products with them go to y.
template <class F>
inline Four<F> four_of(const Matrices &m, int64_t expert, int64_t tile, int64_t num, float *y) {
  const int64_t apart = num > F::kFew ? 1 : quarter_of(m.n), n = num > F::kFew ? kColumns * tile : tile;
  Four<F> four;
  four.y = y + n;
  four.apart = apart;
  four.num = 1;
  for (int c = 0; c < kColumns; c++) {
    if (c && n + c * apart < m.n) four.num = c + 1;
    const int64_t at = expert * m.n + n + (four.num - 1) * apart;
    four.w[c] = static_cast<const typename F::W *>(m.values) + at * m.k;
    for (int r = 0; r < 4; r++) {
      four.scale[4 * r + c] = m.scale ? m.scale[at] : 1.0f;
      four.excess[4 * r + c] = m.more ? 128 * static_cast<const int32_t *>(m.more)[at] : 0;
    }
  }
  return four;
}

// Four tiles' weight rows a quarter of the matrix apart, by a few rows: lanes are added up once for four weight rows of each quarter.
template <class F, int R>
TRINITY_APART void strip(const Lines<F> &lines, const Matrices &m, int64_t at, int64_t apart, float *y, int64_t y_step) {
  typename F::Part parts[R][4];
#pragma GCC unroll 1
  for (int t = 0; t < 4; t++) {
    typename F::Sum sums[R][kColumns];
    const typename F::W *w[kColumns];
    for (int c = 0; c < kColumns; c++) w[c] = static_cast<const typename F::W *>(m.values) + (at + t + c * apart) * m.k;
    add_all<F, R>(lines.x, w, m.k, Nothing(), sums);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) parts[r][t] = F::part(sums[r]);
  }
  for (int r = 0; r < R; r++) {
    alignas(64) float out[16];
    F::whole(parts[r], m, at, apart, lines.scale[4 * r], out);
    for (int c = 0; c < kColumns; c++) __builtin_memcpy(y + (lines.first + r) * y_step + c * apart, out + 4 * c, 4 * sizeof *out);
  }
}

// As many tiles from `from` on as strips take -> the next tile.
template <class F>
inline int64_t in_strips(const Lines<F> &lines, const Matrices &m, int64_t e, int64_t from, int64_t last, float *y, int64_t y_step) {
  const int64_t apart = quarter_of(m.n);
  if (!F::kPads && m.k % F::kStep) return from;
  for (; from + 4 <= last && from + 3 + 3 * apart < m.n; from += 4) {
    const int64_t at = e * m.n + from;
    if (lines.num == 1) strip<F, 1>(lines, m, at, apart, y + from, y_step);
    else if (lines.num == 2) strip<F, 2>(lines, m, at, apart, y + from, y_step);
    else strip<F, 3>(lines, m, at, apart, y + from, y_step);
  }
  return from;
}

#include "unpacked.inl"

// Weights that pass by in another form than they are stored in have a function of their own; false: nothing is done.
template <class F>
inline bool repacked(F, const Rows &, const Matrices &, int64_t, int64_t, int64_t, int64_t, int64_t, float *, int64_t) {
  return false;
}

// Rows [lo, hi) by tiles [from, from + num_tiles) of an expert's matrix; row 0's products with the whole of it go to y.
template <class F>
inline void products(const Rows &rows, const Matrices &w, int64_t e, int64_t lo, int64_t hi, int64_t from, int64_t num_tiles,
                     float *y, int64_t y_step) {
  if (repacked(F(), rows, w, e, lo, hi, kColumns * from, kColumns * (from + num_tiles), y, y_step)) return;
  typename F::Mode mode;
  Lines<F> lines[kBlock];
  for (int64_t first = lo; first < hi; first += kBlock) {
    const int num = lines_of<F>(rows, w.k, first, first + kBlock < hi ? first + kBlock : hi, lines);
    int64_t i = from;
    if constexpr (F::kStrips)
      if (hi - lo <= (F::kFew < kStripRows ? F::kFew : kStripRows)) i = in_strips<F>(lines[0], w, e, from, from + num_tiles, y, y_step);
    for (; i < from + num_tiles; i++) put_all<F>(lines, num, four_of<F>(w, e, i, hi - lo, y), w.k, y_step);
  }
}

template <class F>
void multiply_as(const Product &p, int64_t first, int64_t last) {
  const int64_t all = quarter_of(p.w.n), tiles = panel_of(p.format, p.w.k), panels = (all + tiles - 1) / tiles;
  for (int64_t u = first; u < last; u++) {
    const int64_t e = u / panels, from = u % panels * tiles, num = tiles < all - from ? tiles : all - from;
    products<F>(p.x, p.w, e, e ? p.end[e - 1] : 0, p.end[e], from, num, p.y, p.y_step);
  }
}

// Rows [lo, hi) by all of an expert's matrix, the first one's products to y.
template <class F>
inline void project(const Rows &rows, const Matrices &w, int64_t e, int64_t lo, int64_t hi, float *y) {
  products<F>(rows, w, e, lo, hi, 0, quarter_of(w.n), y - lo * w.n, w.n);
}

// elementwise.exp of trinity/ops/batch_invariant, which has the reasons.
inline float exp_of(float x) {
  const float kRound = 12582912.0f;
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_fmaf(x, 1.44269504f, kRound) - kRound;
  const float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
  float p = __builtin_fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  const int32_t power = static_cast<int32_t>(n == n ? n : 0.0f) + 127;
  return (__builtin_fmaf(p, r * r, r) + 1.0f) * as_float(static_cast<uint32_t>(power) << 23);
}

template <class F>
inline void gate_by(float *__restrict hidden, const float *__restrict up, float weight, int64_t f) {
  for (int64_t i = 0; i < f; i++) {
    const float g = F::kRounds ? rounded_to_brain(hidden[i]) : hidden[i];
    const float u = F::kRounds ? rounded_to_brain(up[i]) : up[i];
    hidden[i] = g / (1.0f + exp_of(-g)) * u * weight;
  }
}

inline float largest(const float *__restrict x, int64_t k) {  // NaN, whose bits are largest, if there is one
  int32_t most = 0;
  for (int64_t i = 0; i < k; i++) {
    const int32_t bits = static_cast<int32_t>(as_bits(x[i]) & 0x7fffffff);
    most = bits > most ? bits : most;
  }
  return as_float(static_cast<uint32_t>(most));
}

inline void to_bytes(const float *__restrict x, int64_t k, uint8_t *__restrict q, float *scale) {
  const float kRound = 12582912.0f, amax = largest(x, k);  // kRound: added, it leaves a rounded number in the lowest bits
  const bool is_finite = amax < __builtin_inff();
  *scale = is_finite ? amax / 127.0f : __builtin_nanf("");
  const float factor = is_finite && amax >= 1e-30f ? 127.0f / amax : 0.0f;
  if (factor == 0.0f) {
    for (int64_t i = 0; i < k; i++) q[i] = 128;
    return;
  }
  for (int64_t i = 0; i < k; i++) q[i] = static_cast<uint8_t>(as_bits(x[i] * factor + kRound) + 128);
}

void round_rows_here(Format format, const float *x, int64_t num, int64_t k, void *values, float *scale) {
  if (format == kInt8)
    for (int64_t r = 0; r < num; r++) to_bytes(x + r * k, k, static_cast<uint8_t *>(values) + r * k, scale + r);
  else if (format == kBfloat16)
    for (int64_t i = 0; i < num * k; i++) static_cast<uint16_t *>(values)[i] = brain_of(x[i]);
  else
    __builtin_memcpy(values, x, static_cast<uint64_t>(num * k) * 4);
}

inline int64_t whole_lines(int64_t num_bytes) { return (num_bytes + 63) / 64 * 64; }

template <class F>
void unit_of(const FeedForward &l, int64_t e, int64_t lo, int64_t hi) {
  const int64_t num = hi - lo, f = l.gate.n, size = whole_lines(num * f * 4);
  char *memory = static_cast<char *>(scratch(0, 3 * size + whole_lines(num * 4)));
  float *hidden = reinterpret_cast<float *>(memory), *other = reinterpret_cast<float *>(memory + size);
  float *scale = reinterpret_cast<float *>(memory + 3 * size);
  project<F>(l.x, l.gate, e, lo, hi, hidden);
  project<F>(l.x, l.up, e, lo, hi, other);
  for (int64_t r = 0; r < num; r++) gate_by<F>(hidden + r * f, other + r * f, l.weight ? l.weight[lo + r] : 1.0f, f);
  Rows rows = {hidden, nullptr, nullptr};
  if (rows_of(l.format) != kFloat32) {
    rows = {memory + 2 * size, l.format == kInt8 ? scale : nullptr, nullptr};
    round_rows_here(l.format, hidden, num, f, memory + 2 * size, scale);
  }
  project<F>(rows, l.down, e, 0, num, l.y + lo * l.down.n);
}

// Call something with the format that a number stands for.
template <class Call>
inline void as_format(Format format, Call call) {
  if (format == kFloat32) call(FloatFormat());
  else if (format == kBfloat16) call(BrainFormat());
  else if (format == kInt8) call(ByteFormat());
  else if (format == kFp8) call(Fp8Format());
  else call(Nvfp4Format());
}

void multiply_here(const Product &p, int64_t first, int64_t last) {
  as_format(p.format, [&](auto f) { multiply_as<decltype(f)>(p, first, last); });
}

void feed_forward_here(const FeedForward &l, int64_t first, int64_t last) {
  as_format(l.format, [&](auto f) {
    for (int64_t u = first; u < last; u++) unit_of<decltype(f)>(l, l.expert[u], l.begin[u], l.end[u]);
  });
}

}  // namespace
}  // namespace trinity
