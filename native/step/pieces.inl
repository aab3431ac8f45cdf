// The pieces for the instructions that the including file is compiled for, which names them PIECES. Everything else is in an
// unnamed namespace: another file has the same names for other instructions.
#include <math.h>
#include <string.h>

#include "step.h"
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between inlined functions of this file alone
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace trinity {
namespace {

constexpr int kLanes = 16, kBlock = 64, kLines = 4, kKeys = 4, kWide = 4;
constexpr int64_t kMostDim = 1 << 15;  // of a row that is normed
typedef float Vector __attribute__((vector_size(64)));

inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

struct Real {  // float32
  typedef float T;
  static float wide(T x) { return x; }
  static T narrow(float x) { return x; }
  static Vector load(const T *p) { Vector v; memcpy(&v, p, sizeof v); return v; }
};

struct Brain {  // bfloat16
  typedef uint16_t T;
  static float wide(T x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static T narrow(float x) {
    const uint32_t bits = as_bits(x);
    return x == x ? static_cast<T>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : static_cast<T>(0x7fc0);
  }
  static Vector load(const T *p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return (Vector)_mm512_maskz_slli_epi32(0xffff, wide, 16);
#else
    Vector v;
    for (int lane = 0; lane < kLanes; lane++) v[lane] = wide(p[lane]);
    return v;
#endif
  }
};

struct Byte {  // int8
  typedef int8_t T;
  static float wide(T x) { return x; }
  static Vector load(const T *p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    return (Vector)_mm512_maskz_cvtepi32_ps(0xffff, wide);
#else
    Vector v;
    for (int lane = 0; lane < kLanes; lane++) v[lane] = p[lane];
    return v;
#endif
  }
};

inline Vector fused(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  for (int lane = 0; lane < kLanes; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#endif
}

// -- sums in the order of torch's (aten/src/ATen/native/cpu/SumKernel.cpp): four vectors of AVX2 side by side, in four levels

float total_as_torch(const float *x, int64_t n) {
  constexpr int L = 8;
  const int64_t vectors = n / L, num = vectors / 4;
  int64_t log = 0;
  while ((int64_t(1) << log) < num) log++;
  const int64_t power = log / 4 > 4 ? log / 4 : 4, step = int64_t(1) << power;
  float sums[4][4 * L] = {};
  int64_t i = 0;
  while (i + step <= num) {
    for (int64_t end = i + step; i < end; i++)
      for (int lane = 0; lane < 4 * L; lane++) sums[0][lane] += x[4 * L * i + lane];
    for (int level = 1; level < 4; level++) {
      for (int lane = 0; lane < 4 * L; lane++) {
        sums[level][lane] += sums[level - 1][lane];
        sums[level - 1][lane] = 0;
      }
      if (i & ((step - 1) << (level * power))) break;
    }
  }
  for (; i < num; i++)
    for (int lane = 0; lane < 4 * L; lane++) sums[0][lane] += x[4 * L * i + lane];
  for (int level = 1; level < 4; level++)
    for (int lane = 0; lane < 4 * L; lane++) sums[0][lane] += sums[level][lane];
  for (int64_t vector = 4 * num; vector < vectors; vector++)
    for (int lane = 0; lane < L; lane++) sums[0][lane] += x[L * vector + lane];
  for (int part = 1; part < 4; part++)
    for (int lane = 0; lane < L; lane++) sums[0][lane] += sums[0][L * part + lane];
  float total = 0;
  for (int64_t at = vectors * L; at < n; at++) total += x[at];
  for (int lane = 0; lane < L; lane++) total += sums[0][lane];
  return total;
}

float total_of_few(const float *x, int64_t n) {  // fewer than a vector has
  float sums[4] = {};
  const int64_t num = n / 4;
  for (int64_t i = 0; i < num; i++)
    for (int part = 0; part < 4; part++) sums[part] += x[4 * i + part];
  for (int64_t at = 4 * num; at < n; at++) sums[0] += x[at];
  for (int part = 1; part < 4; part++) sums[0] += sums[part];
  return sums[0];
}

float total(const float *x, int64_t n) { return n < 8 ? total_of_few(x, n) : total_as_torch(x, n); }

template <class E>
void norm_of(const Norm &norm, const typename E::T *x, int64_t n, typename E::T *y) {
  static thread_local float wide[kMostDim], squares[kMostDim];
  const typename E::T *gain = static_cast<const typename E::T *>(norm.weight);
  for (int64_t i = 0; i < n; i++) {
    wide[i] = E::wide(x[i]);
    squares[i] = wide[i] * wide[i];
  }
  const float sum = total(squares, n);
  const float by = 1.0f / sqrtf(sum / static_cast<float>(n) + static_cast<float>(norm.eps));
  if (norm.rounds_first)
    for (int64_t i = 0; i < n; i++) y[i] = E::narrow(E::wide(gain[i]) * E::wide(E::narrow(wide[i] * by)));
  else
    for (int64_t i = 0; i < n; i++) y[i] = E::narrow(E::wide(gain[i]) * (wide[i] * by));
}

// -- elementwise.exp of trinity/ops/batch_invariant, which has the reasons

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

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

void sigmoid(const float *x, int64_t n, float *to) {
  for (int64_t i = 0; i < n; i++) to[i] = sigmoid_of(x[i]);
}

// elementwise.softmax: sums in sixteen lanes, which are added up in turn
void softmax(const float *x, int64_t n, float *to) {
  float top = -INFINITY, lanes[kLanes] = {}, sum = 0;
  for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
  for (int64_t i = 0; i < n; i++) to[i] = exp_of(x[i] - top);
  for (int64_t at = 0; at + kLanes <= n; at += kLanes)
    for (int lane = 0; lane < kLanes; lane++) lanes[lane] += to[at + lane];
  for (int64_t at = n / kLanes * kLanes; at < n; at++) lanes[at % kLanes] += to[at];
  for (float lane : lanes) sum += lane;
  for (int64_t i = 0; i < n; i++) to[i] = to[i] / sum;
}

template <class E>
void gated_as(const typename E::T *x, const typename E::T *gate, int64_t n, typename E::T *to) {
  for (int64_t i = 0; i < n; i++) to[i] = E::narrow(E::wide(x[i]) * E::wide(E::narrow(sigmoid_of(E::wide(gate[i])))));
}

template <class E>
void added_as(const typename E::T *x, const typename E::T *y, int64_t n, typename E::T *to) {
  for (int64_t i = 0; i < n; i++) to[i] = E::narrow(E::wide(x[i]) + E::wide(y[i]));
}

template <class E>
void rounded_as(const float *y, const typename E::T *bias, int64_t n, typename E::T *to) {
  if (bias)
    for (int64_t i = 0; i < n; i++) to[i] = E::narrow(E::wide(E::narrow(y[i])) + E::wide(bias[i]));
  else
    for (int64_t i = 0; i < n; i++) to[i] = E::narrow(y[i]);
}

// silu(gate) * up, as trinity/ops/batch_invariant/fused_mlp.py has it
template <class E>
void swiglu_as(const float *gate, const float *up, int64_t n, typename E::T *to) {
  for (int64_t i = 0; i < n; i++) {
    const float g = E::wide(E::narrow(gate[i]));
    to[i] = E::narrow(g / (1.0f + exp_of(-g)) * E::wide(E::narrow(up[i])));
  }
}

template <class E>
void summed_as(const float *const *rows, int64_t num, int64_t n, typename E::T *to) {
  for (int64_t i = 0; i < n; i++) {
    float sum = 0;
    for (int64_t row = 0; row < num; row++) sum += E::wide(E::narrow(rows[row][i]));
    to[i] = E::narrow(sum);
  }
}

template <class E>
void rotate(typename E::T *x, const typename E::T *cos, const typename E::T *sin, int64_t rotated) {
  const int64_t half = rotated / 2;
  const auto product = [](typename E::T a, typename E::T b) { return E::wide(E::narrow(E::wide(a) * E::wide(b))); };
  for (int64_t i = 0; i < half; i++) {
    const typename E::T a = x[i], b = x[i + half];
    const float turned = E::wide(E::narrow(-E::wide(b) * E::wide(sin[i])));
    x[i] = E::narrow(product(a, cos[i]) + turned);
    x[i + half] = E::narrow(product(b, cos[i + half]) + product(a, sin[i + half]));
  }
}

template <class E>
void heads_as(const Project &p, const Norm &norm, const Matrix &m, bool rotates, const float *y, const void *cos,
              const void *sin, typename E::T *to) {
  typedef typename E::T T;
  rounded_as<E>(y, static_cast<const T *>(m.bias), m.n, to);
  for (int64_t at = 0; at < m.n; at += p.head_dim) {
    if (norm.weight) norm_of<E>(norm, to + at, p.head_dim, to + at);
    if (rotates) rotate<E>(to + at, static_cast<const T *>(cos), static_cast<const T *>(sin), p.rotated);
  }
}

// -- attention of one query and a key-value head: the sums of trinity/ops/batch_invariant/attention.py

// Two vectors into one that has the sums of the halves of their runs of so many lanes.
#define FOLDED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
inline Vector folded16(Vector a, Vector b) {
  return FOLDED(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         FOLDED(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
inline Vector folded8(Vector a, Vector b) {
  return FOLDED(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
         FOLDED(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
inline Vector folded4(Vector a, Vector b) {
  return FOLDED(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
         FOLDED(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
inline Vector folded2(Vector a, Vector b) {
  return FOLDED(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         FOLDED(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

template <class E>
inline void score(const float *lines, int64_t dim, const typename E::T *const *keys, float *out) {
  Vector sums[kKeys * kLines];
  for (Vector &sum : sums) sum = Vector{};
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vector line[kLines];
    for (int l = 0; l < kLines; l++) line[l] = Real::load(lines + l * dim + i);
#pragma GCC unroll 4
    for (int key = 0; key < kKeys; key++) {
      const Vector loaded = E::load(keys[key] + i);
#pragma GCC unroll 4
      for (int l = 0; l < kLines; l++) sums[kLines * key + l] = fused(loaded, line[l], sums[kLines * key + l]);
    }
  }
  for (int i = 0; i < 8; i++) sums[i] = folded16(sums[2 * i], sums[2 * i + 1]);
  for (int i = 0; i < 4; i++) sums[i] = folded8(sums[2 * i], sums[2 * i + 1]);
  for (int i = 0; i < 2; i++) sums[i] = folded4(sums[2 * i], sums[2 * i + 1]);
  sums[0] = folded2(sums[0], sums[1]);
  memcpy(out, &sums[0], sizeof sums[0]);
  for (int64_t i = whole; i < dim; i++)
    for (int key = 0; key < kKeys; key++)
      for (int l = 0; l < kLines; l++)
        out[kLines * key + l] = __builtin_fmaf(E::wide(keys[key][i]), lines[l * dim + i], out[kLines * key + l]);
}

template <class E>
void wide_product_as(const typename E::T *x, int64_t num, int64_t k, const typename E::T *w, int64_t n, float *y) {
  static thread_local float lines[kLines * kMostDim];
  for (int64_t l = 0; l < kLines; l++)
    for (int64_t i = 0; i < k; i++) lines[l * k + i] = E::wide(x[(l < num ? l : num - 1) * k + i]);
  for (int64_t at = 0; at < n; at += kKeys) {
    alignas(64) float out[kKeys * kLines];
    const typename E::T *four[kKeys];
    for (int64_t key = 0; key < kKeys; key++) four[key] = w + (at + key < n ? at + key : n - 1) * k;
    score<E>(lines, k, four, out);
    for (int64_t key = 0; key < kKeys && at + key < n; key++)
      for (int64_t l = 0; l < num; l++) y[l * n + at + key] = out[kLines * key + l];
  }
}

struct Panel {  // four lines: heads of a query that share a key-value head; those that are missing repeat the last
  float top[kLines], total[kLines];
  float *lines, *mixed;  // [4, d]
};

// Scores of keys [begin, end) of a block become weights relative to the highest so far. Sixteen at a time: four keys, four lines.
inline void soften(float *scores, int begin, int end, int64_t dim, Panel *panel) {
  const int first = begin / kKeys * kLanes, last = (end + kKeys - 1) / kKeys * kLanes;
  float highest[kLanes], top[kLanes], sums[kLanes] = {};
  for (float &each : highest) each = -INFINITY;
  for (int at = first; at < kLines * begin; at++) scores[at] = -INFINITY;
  for (int at = kLines * end; at < last; at++) scores[at] = -INFINITY;
  for (int at = first; at < last; at += kLanes)
    for (int lane = 0; lane < kLanes; lane++) highest[lane] = scores[at + lane] > highest[lane] ? scores[at + lane] : highest[lane];
  for (int l = 0; l < kLines; l++) {
    for (int lane = l; lane < kLanes; lane += kLines) highest[l] = highest[lane] > highest[l] ? highest[lane] : highest[l];
    if (highest[l] > panel->top[l]) {
      const float by = exp_of(panel->top[l] - highest[l]);
      panel->total[l] *= by;
      for (int64_t i = 0; i < dim; i++) panel->mixed[l * dim + i] *= by;
      panel->top[l] = highest[l];
    }
    for (int lane = l; lane < kLanes; lane += kLines) top[lane] = panel->top[l];
  }
  for (int at = first; at < last; at += kLanes)
    for (int lane = 0; lane < kLanes; lane++) scores[at + lane] = exp_of(scores[at + lane] - top[lane]);
  for (int at = first; at < kLines * begin; at++) scores[at] = 0;
  for (int at = kLines * end; at < last; at++) scores[at] = 0;
  for (int at = first; at < last; at += kLanes)
    for (int lane = 0; lane < kLanes; lane++) sums[lane] += scores[at + lane];
  for (int l = 0; l < kLines; l++) panel->total[l] += (sums[l] + sums[l + 8]) + (sums[l + 4] + sums[l + 12]);
}

// mixed [4, d] += the values of keys [begin, end), each times its line's weight; `kVectors` of a value at once.
template <class E, int kVectors>
inline void mix_some(const float *scores, const typename E::T *const *values, int begin, int end, int64_t i, int64_t dim, float *mixed) {
  Vector sums[kLines][kVectors] = {};
  for (int j = begin; j < end; j++) {
    Vector value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) value[v] = E::load(values[j] + i + v * kLanes);
#pragma GCC unroll 4
    for (int l = 0; l < kLines; l++) {
      const Vector by = Vector{} + scores[kLines * j + l];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[l][v] = fused(by, value[v], sums[l][v]);
    }
  }
  for (int l = 0; l < kLines; l++)
    for (int v = 0; v < kVectors; v++) {
      float *to = mixed + l * dim + i + v * kLanes;
      const Vector found = Real::load(to) + sums[l][v];
      memcpy(to, &found, sizeof found);
    }
}

template <class E>
inline void mix(const float *scores, const typename E::T *const *values, int begin, int end, int64_t dim, float *mixed) {
  const int64_t whole = dim / kLanes * kLanes;
  int64_t at = 0;
  for (; at + kWide * kLanes <= whole; at += kWide * kLanes) mix_some<E, kWide>(scores, values, begin, end, at, dim, mixed);
  for (; at < whole; at += kLanes) mix_some<E, 1>(scores, values, begin, end, at, dim, mixed);
  for (int l = 0; l < kLines; l++)
    for (int64_t i = whole; i < dim; i++) {
      float found = 0;
      for (int j = begin; j < end; j++) found = __builtin_fmaf(scores[kLines * j + l], E::wide(values[j][i]), found);
      mixed[l * dim + i] += found;
    }
}

// Slots of the positions [first, last) of a row, of a block of keys that begins at `at`.
inline void find_slots(const Attend &a, int64_t row, int64_t at, int begin, int end, int64_t *slot) {
  const int32_t *blocks = a.block + row * a.columns;
  for (int j = begin; j < end;) {
    const int64_t place = (at + j) / a.size, left = (place + 1) * a.size - at, base = blocks[place] * a.size - place * a.size + at;
    for (const int last = left < end ? static_cast<int>(left) : end; j < last; j++) slot[j] = base + j;
  }
}

inline void scaled(const float *scale, const int64_t *slot, int64_t groups, int begin, int end, float *scores) {
  for (int j = begin; j < end; j++)
    for (int l = 0; l < kLines; l++) scores[kLines * j + l] *= scale[slot[j] * groups];
}

// S: what keys and values are kept in.
template <class S>
void meet(const Attend &a, int64_t row, int64_t position, int64_t group, const Kept &kept, Panel *panel) {
  typedef typename S::T T;
  const T *keys = static_cast<const T *>(kept.keys) + group * a.dim, *values = static_cast<const T *>(kept.values) + group * a.dim;
  const int64_t stride = a.groups * a.dim, last = position + 1, first = a.window && a.window < last ? last - a.window : 0;
  for (int64_t at = first - first % kBlock; at < last; at += kBlock) {
    alignas(64) float scores[kBlock * kLines];
    int64_t slot[kBlock];
    const T *places[kBlock];
    const int begin = static_cast<int>(first > at ? first - at : 0), end = static_cast<int>(last < at + kBlock ? last - at : kBlock);
    find_slots(a, row, at, begin, end, slot);
    for (int j = begin; j < end; j++) places[j] = keys + slot[j] * stride;
    for (int j = begin / kKeys * kKeys; j < end; j += kKeys) {
      const T *four[kKeys];
      for (int key = 0; key < kKeys; key++) four[key] = places[j + key < begin ? begin : j + key < end ? j + key : end - 1];
      score<S>(panel->lines, a.dim, four, scores + kLines * j);
    }
    if (kept.key_scale) scaled(kept.key_scale + group, slot, a.groups, begin, end, scores);
    soften(scores, begin, end, a.dim, panel);
    if (kept.value_scale) scaled(kept.value_scale + group, slot, a.groups, begin, end, scores);
    for (int j = begin; j < end; j++) places[j] = values + slot[j] * stride;
    mix<S>(scores, places, begin, end, a.dim, panel->mixed);
  }
}

// Unit u: key-value head u % G of query u / G.
template <class E, class S>
void attend_as(const Attend &a, const Tokens &t, const typename E::T *q, const Kept &kept, typename E::T *out, int64_t unit) {
  static thread_local float lines[kLines * kMostDim / 8], mixed[kLines * kMostDim / 8];
  const int64_t query = unit / a.groups, group = unit % a.groups, share = a.heads / a.groups;
  const float by = static_cast<float>(1 / sqrt(static_cast<double>(a.dim)));
  for (int64_t head = group * share; head < (group + 1) * share; head += kLines) {
    const int64_t num = (group + 1) * share - head < kLines ? (group + 1) * share - head : kLines;
    Panel panel = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {}, lines, mixed};
    for (int l = 0; l < kLines; l++) {
      const typename E::T *line = q + (query * a.heads + head + (l < num ? l : num - 1)) * a.dim;
      for (int64_t i = 0; i < a.dim; i++) lines[l * a.dim + i] = E::wide(line[i]) * by;
    }
    memset(mixed, 0, sizeof(float) * kLines * a.dim);
    meet<S>(a, t.row[query], t.position[query], group, kept, &panel);
    for (int64_t l = 0; l < num; l++)
      for (int64_t i = 0; i < a.dim; i++)
        out[(query * a.heads + head + l) * a.dim + i] = E::narrow(mixed[l * a.dim + i] / panel.total[l]);
  }
}

// As trinity/engine/kv_pools.py:rounded has it. What is not finite is said by its scale.
template <class E>
void round_heads(const Attend &a, const typename E::T *from, int8_t *to, float *scale) {
  for (int64_t group = 0; group < a.groups; group++, from += a.dim, to += a.dim) {
    float most = 0;
    for (int64_t i = 0; i < a.dim; i++) {
      const float size = fabsf(E::wide(from[i]));
      most = size > most || size != size ? size : most;
    }
    const float by = most / 127.0f < 1.17549435e-38f ? 1.17549435e-38f : most / 127.0f;
    scale[group] = by;
    for (int64_t i = 0; i < a.dim; i++) {
      const float number = E::wide(from[i]) / by;
      to[i] = fabsf(number) < 128.0f ? static_cast<int8_t>(nearbyintf(number)) : static_cast<int8_t>(0);
    }
  }
}

// The first of the highest numbers; NaN is the highest.
template <class E>
int64_t highest_as(const typename E::T *x, int64_t n, float *found) {
  float tops[kBlock], top = -INFINITY;
  int is_odd[kBlock] = {};
  for (float &each : tops) each = -INFINITY;
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t at = 0; at < whole; at += kBlock)
    for (int lane = 0; lane < kBlock; lane++) {
      const float one = E::wide(x[at + lane]);
      tops[lane] = one > tops[lane] ? one : tops[lane];
      is_odd[lane] |= one != one;
    }
  bool has_nan = false;
  for (int lane = 0; lane < kBlock; lane++) top = tops[lane] > top ? tops[lane] : top, has_nan |= is_odd[lane];
  for (int64_t i = whole; i < n; i++) {
    const float one = E::wide(x[i]);
    top = one > top ? one : top;
    has_nan |= one != one;
  }
  int64_t at = 0;
  for (; at < whole; at += kBlock) {
    int is_it = 0;
    for (int lane = 0; lane < kBlock; lane++) {
      const float one = E::wide(x[at + lane]);
      is_it |= has_nan ? one != one : one == top;
    }
    if (is_it) break;
  }
  while (has_nan ? E::wide(x[at]) == E::wide(x[at]) : E::wide(x[at]) != top) at++;
  *found = E::wide(x[at]);
  return at;
}

// -- the table: both types behind one name each

#define EITHER(is_brain, call, ...) ((is_brain) ? call<Brain> __VA_ARGS__ : call<Real> __VA_ARGS__)

template <class E, class V>
const typename E::T *in(const V *p) { return static_cast<const typename E::T *>(p); }

template <class E>
void norm_any(const Norm &norm, const void *x, int64_t n, void *y) {
  norm_of<E>(norm, in<E>(x), n, static_cast<typename E::T *>(y));
}
template <class E>
void heads_any(const Project &p, const Norm &norm, const Matrix &m, bool rotates, const float *y, const void *cos,
               const void *sin, void *to) {
  heads_as<E>(p, norm, m, rotates, y, cos, sin, static_cast<typename E::T *>(to));
}
template <class E>
void attend_any(const Attend &a, const Tokens &t, const void *q, const Kept &kept, void *out, int64_t unit) {
  typename E::T *to = static_cast<typename E::T *>(out);
  a.stored == kInt8 ? attend_as<E, Byte>(a, t, in<E>(q), kept, to, unit) : attend_as<E, E>(a, t, in<E>(q), kept, to, unit);
}
template <class E>
void keep_any(const Attend &a, const void *from, int64_t slot, void *to, float *scale) {
  const int64_t width = a.groups * a.dim;
  if (a.stored == kInt8) round_heads<E>(a, in<E>(from), static_cast<int8_t *>(to) + slot * width, scale + slot * a.groups);
  else memcpy(static_cast<typename E::T *>(to) + slot * width, from, width * sizeof(typename E::T));
}
template <class E>
void rounded_any(const float *y, const void *bias, int64_t n, void *to) {
  rounded_as<E>(y, in<E>(bias), n, static_cast<typename E::T *>(to));
}
template <class E>
void summed_any(const float *const *rows, int64_t num, int64_t n, void *to) {
  summed_as<E>(rows, num, n, static_cast<typename E::T *>(to));
}
template <class E>
void swiglu_any(const float *gate, const float *up, int64_t n, void *to) {
  swiglu_as<E>(gate, up, n, static_cast<typename E::T *>(to));
}
template <class E>
void gated_any(const void *x, const void *gate, int64_t n, void *to) {
  gated_as<E>(in<E>(x), in<E>(gate), n, static_cast<typename E::T *>(to));
}
template <class E>
void added_any(const void *x, const void *y, int64_t n, void *to) {
  added_as<E>(in<E>(x), in<E>(y), n, static_cast<typename E::T *>(to));
}

void norm(const Norm &of, bool is_brain, const void *x, int64_t n, void *y) { EITHER(is_brain, norm_any, (of, x, n, y)); }
void heads(const Project &p, const Norm &of, const Matrix &m, bool rotates, const float *y, const void *cos, const void *sin,
           void *to) {
  EITHER(p.is_brain, heads_any, (p, of, m, rotates, y, cos, sin, to));
}
void attend_one(const Attend &a, const Tokens &t, const void *q, const Kept &kept, void *out, int64_t unit) {
  EITHER(a.is_brain, attend_any, (a, t, q, kept, out, unit));
}
void keep(const Attend &a, const void *from, int64_t slot, void *to, float *scale) {
  EITHER(a.is_brain, keep_any, (a, from, slot, to, scale));
}
int64_t highest(bool is_brain, const void *x, int64_t n, float *found) {
  return is_brain ? highest_as<Brain>(in<Brain>(x), n, found) : highest_as<Real>(in<Real>(x), n, found);
}
void rounded(bool is_brain, const float *y, const void *bias, int64_t n, void *to) {
  EITHER(is_brain, rounded_any, (y, bias, n, to));
}
template <class E>
void wide_product_any(const void *x, int64_t num, int64_t k, const void *w, int64_t n, float *y) {
  wide_product_as<E>(in<E>(x), num, k, in<E>(w), n, y);
}
void wide_product(bool is_brain, const void *x, int64_t num, int64_t k, const void *w, int64_t n, float *y) {
  EITHER(is_brain, wide_product_any, (x, num, k, w, n, y));
}
void summed(bool is_brain, const float *const *rows, int64_t num, int64_t n, void *to) {
  EITHER(is_brain, summed_any, (rows, num, n, to));
}
void swiglu(bool is_brain, const float *gate, const float *up, int64_t n, void *to) {
  EITHER(is_brain, swiglu_any, (gate, up, n, to));
}
void gated(bool is_brain, const void *x, const void *gate, int64_t n, void *to) { EITHER(is_brain, gated_any, (x, gate, n, to)); }
void added(bool is_brain, const void *x, const void *y, int64_t n, void *to) { EITHER(is_brain, added_any, (x, y, n, to)); }

}  // namespace

const Pieces PIECES = {norm, heads, keep, attend_one, highest, wide_product, rounded, gated, added, sigmoid, softmax, swiglu, summed, total};

}  // namespace trinity
