// The loops around tiles of up to four rows and four weight rows, for the formats that the including file has defined:
// FloatFormat, BrainFormat and ByteFormat, each with
//   X, W: elements of rows and weights; Total: what sums are; kStep: elements of a step; kRows: most rows of a tile, 1, 2 or 4;
//   Sum zero(), Row/Weight load_x(p), load_w(p), load_x(p, left), load_w(p, left) with zeros for what is missing,
//   add(sum, weight, row), and totals(sums[R][4], out): out[4 * column + row].
// Everything is in an unnamed namespace: another file has the same names for other instructions.

namespace trinity {
namespace {

struct Column {  // a weight row and where its products go
  const void *w;
  float scale;
  int32_t total;
  float *y;        // of the first row; none: nowhere
};

template <class F, int R>
inline void tile(const typename F::X *const *x, const Column *columns, int64_t k, typename F::Total *out) {
  typename F::Sum sums[R][kColumns];
  const typename F::W *w[kColumns];
  for (int c = 0; c < kColumns; c++) w[c] = static_cast<const typename F::W *>(columns[c].w);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; c++) sums[r][c] = F::zero();
  const int64_t whole = k / F::kStep * F::kStep;
  for (int64_t i = 0; i < whole; i += F::kStep) {
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
  F::template totals<R>(sums, out);
  if constexpr (!F::kPads)  // one by one, after the others
    for (int64_t i = whole; i < k; i++)
      for (int c = 0; c < kColumns; c++)
        for (int r = 0; r < R; r++) out[4 * c + r] = __builtin_fmaf(w[c][i], x[r][i], out[4 * c + r]);
}

inline float finished(float total, const Column &, float) { return total; }
inline float finished(int32_t total, const Column &column, float scale) {
  return static_cast<float>(total - 128 * column.total) * column.scale * scale;
}

struct Lines {  // of up to R rows
  const void *x[4];
  float scale[4];
};

template <class F>
inline void lines_of(const Rows &rows, int64_t k, int64_t first, int num, Lines *lines) {
  const typename F::X *values = static_cast<const typename F::X *>(rows.values);
  for (int r = 0; r < num; r++) {
    const int64_t at = rows.at ? rows.at[first + r] : first + r;
    lines->x[r] = values + at * k;
    lines->scale[r] = rows.scale ? rows.scale[at] : 1.0f;
  }
}

template <class F, int R>
inline void put(const Lines &lines, const Column *columns, int64_t k, int64_t y_step) {
  alignas(64) typename F::Total out[16];
  const typename F::X *x[R];
  for (int r = 0; r < R; r++) x[r] = static_cast<const typename F::X *>(lines.x[r]);
  tile<F, R>(x, columns, k, out);
  for (int c = 0; c < kColumns; c++)
    if (columns[c].y)
      for (int r = 0; r < R; r++) columns[c].y[r * y_step] = finished(out[4 * c + r], columns[c], lines.scale[r]);
}

inline Column column_of(Format format, const Matrices &m, int64_t expert, int64_t n, float *y) {
  const int64_t at = expert * m.n + (n < m.n ? n : m.n - 1);
  const char *w = static_cast<const char *>(m.values) + at * m.k * size_of(format);
  return {w, m.scale ? m.scale[at] : 1.0f, m.total ? m.total[at] : 0, n < m.n ? y + n : nullptr};
}

// Tiles [c0, c1) of rows [lo, hi): `columns(c, r)` has the four of tile c, whose products go to row r and those after it.
template <class F, class Columns>
inline void panel(const Rows &rows, int64_t k, int64_t lo, int64_t hi, int64_t c0, int64_t c1, int64_t y_step, Columns columns) {
  typename F::Mode mode;
  for (int64_t r = lo; r < hi;) {
    const int most = hi - r < F::kRows ? static_cast<int>(hi - r) : F::kRows, num = most == 3 ? 2 : most;
    Lines lines;
    lines_of<F>(rows, k, r, num, &lines);
    for (int64_t c = c0; c < c1; c++) {
      Column four[kColumns];
      columns(c, r, four);
      if (num == F::kRows) put<F, F::kRows>(lines, four, k, y_step);
      else if (num == 2) put<F, F::kRows < 2 ? 1 : 2>(lines, four, k, y_step);
      else put<F, 1>(lines, four, k, y_step);
    }
    r += num;
  }
}

template <class F>
void multiply_as(const Product &p, int64_t first, int64_t last) {
  const int64_t quarter = quarter_of(p.w.n), tiles = panel_of(p.format, p.w.k), panels = (quarter + tiles - 1) / tiles;
  for (int64_t u = first; u < last; u++) {
    const int64_t e = u / panels, c0 = u % panels * tiles, c1 = c0 + tiles < quarter ? c0 + tiles : quarter;
    panel<F>(p.x, p.w.k, e ? p.end[e - 1] : 0, p.end[e], c0, c1, p.y_step, [&](int64_t c, int64_t r, Column *four) {
      for (int j = 0; j < kColumns; j++) four[j] = column_of(p.format, p.w, e, c + j * quarter, p.y + r * p.y_step);
    });
  }
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
  const int64_t num = hi - lo, f = l.gate.n, half = (f + 1) / 2, quarter = quarter_of(l.down.n);
  const int64_t hidden_bytes = whole_lines(num * f * 4), line_bytes = whole_lines(num * 4);
  char *memory = static_cast<char *>(scratch(3 * hidden_bytes + line_bytes));
  float *hidden = reinterpret_cast<float *>(memory), *other = reinterpret_cast<float *>(memory + hidden_bytes);
  float *scale = reinterpret_cast<float *>(memory + 3 * hidden_bytes);
  const int64_t gate_tiles = panel_of(l.format, l.gate.k), down_tiles = panel_of(l.format, f);
  for (int64_t c0 = 0; c0 < half; c0 += gate_tiles)
    panel<F>(l.x, l.gate.k, lo, hi, c0, c0 + gate_tiles < half ? c0 + gate_tiles : half, f, [&](int64_t c, int64_t r, Column *four) {
      for (int j = 0; j < 2; j++) {
        four[j] = column_of(l.format, l.gate, e, c + j * half, hidden + (r - lo) * f);
        four[2 + j] = column_of(l.format, l.up, e, c + j * half, other + (r - lo) * f);
      }
    });
  for (int64_t r = 0; r < num; r++) gate_by<F>(hidden + r * f, other + r * f, l.weight ? l.weight[lo + r] : 1.0f, f);
  Rows rows = {hidden, nullptr, nullptr};
  if (l.format != kFloat32) {
    rows = {memory + 2 * hidden_bytes, l.format == kInt8 ? scale : nullptr, nullptr};
    round_rows_here(l.format, hidden, num, f, memory + 2 * hidden_bytes, scale);
  }
  for (int64_t c0 = 0; c0 < quarter; c0 += down_tiles)
    panel<F>(rows, f, 0, num, c0, c0 + down_tiles < quarter ? c0 + down_tiles : quarter, l.down.n, [&](int64_t c, int64_t r, Column *four) {
      for (int j = 0; j < kColumns; j++) four[j] = column_of(l.format, l.down, e, c + j * quarter, l.y + (lo + r) * l.down.n);
    });
}

void multiply_here(const Product &p, int64_t first, int64_t last) {
  if (p.format == kFloat32) multiply_as<FloatFormat>(p, first, last);
  else if (p.format == kBfloat16) multiply_as<BrainFormat>(p, first, last);
  else multiply_as<ByteFormat>(p, first, last);
}

void feed_forward_here(const FeedForward &l, int64_t first, int64_t last) {
  for (int64_t u = first; u < last; u++) {
    if (l.format == kFloat32) unit_of<FloatFormat>(l, l.expert[u], l.begin[u], l.end[u]);
    else if (l.format == kBfloat16) unit_of<BrainFormat>(l, l.expert[u], l.begin[u], l.end[u]);
    else unit_of<ByteFormat>(l, l.expert[u], l.begin[u], l.end[u]);
  }
}

}  // namespace
}  // namespace trinity
