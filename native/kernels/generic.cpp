// For any processor: plain loops over sixteen lanes, which a compiler turns into what there is.
#include "bits.inl"

namespace trinity {
namespace {

template <class T>
struct Lanes {
  T l[16];
};

template <int R, class T>
inline void halves_added(const Lanes<T> (*sums)[kColumns], T *out) {
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kColumns; c++) {
      Lanes<T> s = sums[r][c];
      for (int width = 8; width; width /= 2)
        for (int l = 0; l < width; l++) s.l[l] += s.l[l + width];
      out[4 * r + c] = s.l[0];
    }
}

struct FloatFormat {
  using X = float;
  using W = float;
  using Total = float;
  using Sum = Lanes<float>;
  using Row = Lanes<float>;
  using Weight = Lanes<float>;
  using Mode = AsUsual;
  static constexpr int kRows = 1, kStep = 16, kFew = 4, kAhead = 0;
  static constexpr bool kStrips = false, kPads = false, kRounds = false;
  static Sum zero() { return {}; }
  static Row load_x(const float *p) {
    Row row;
    __builtin_memcpy(row.l, p, sizeof row.l);
    return row;
  }
  static Weight load_w(const float *p) { return load_x(p); }
  static Sum add(Sum sum, const Weight &w, const Row &x) {
    for (int l = 0; l < 16; l++) sum.l[l] = __builtin_fmaf(w.l[l], x.l[l], sum.l[l]);
    return sum;
  }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], float *out) { halves_added<R>(sums, out); }
};

struct BrainFormat {
  using X = uint16_t;
  using W = uint16_t;
  using Total = float;
  using Sum = Lanes<float>;
  using Row = Lanes<uint32_t>;  // pairs; the second is in the upper half
  using Weight = Lanes<uint32_t>;
  using Mode = Flushing;
  static constexpr int kRows = 1, kStep = 32, kFew = 8, kAhead = 0;
  static constexpr bool kStrips = false, kPads = true, kRounds = true;
  static Sum zero() { return {}; }
  static Row load_x(const uint16_t *p, int num = kStep) {
    Row row = {};
    for (int i = 0; i < num; i++) row.l[i / 2] |= static_cast<uint32_t>(p[i]) << (16 * (i % 2));
    return row;
  }
  static Weight load_w(const uint16_t *p, int num = kStep) { return load_x(p, num); }
  static Sum add(Sum sum, const Weight &w, const Row &x) {
    for (int l = 0; l < 16; l++) {
      const float second = __builtin_fmaf(as_float(w.l[l] & 0xffff0000), as_float(x.l[l] & 0xffff0000), sum.l[l]);
      sum.l[l] = __builtin_fmaf(as_float(w.l[l] << 16), as_float(x.l[l] << 16), second);
    }
    return sum;
  }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], float *out) { halves_added<R>(sums, out); }
};

struct ByteFormat {
  using X = uint8_t;
  using W = int8_t;
  using Total = int32_t;
  using Sum = Lanes<int32_t>;
  using Row = Lanes<int32_t>;
  using Weight = Lanes<int32_t>;
  using Mode = AsUsual;
  static constexpr int kRows = 1, kStep = 16, kFew = 8, kAhead = 0;
  static constexpr bool kStrips = false, kPads = true, kRounds = false;
  static Sum zero() { return {}; }
  static Row load_x(const uint8_t *p, int num = kStep) {
    Row row = {};
    for (int i = 0; i < num; i++) row.l[i] = p[i];
    return row;
  }
  static Weight load_w(const int8_t *p, int num = kStep) {
    Weight weight = {};
    for (int i = 0; i < num; i++) weight.l[i] = p[i];
    return weight;
  }
  static Sum add(Sum sum, const Weight &w, const Row &x) {
    for (int l = 0; l < 16; l++) sum.l[l] += w.l[l] * x.l[l];
    return sum;
  }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], int32_t *out) { halves_added<R>(sums, out); }
};

}  // namespace
}  // namespace trinity

#include "tiles.inl"

namespace trinity {
const Table kGeneric = {round_rows_here, multiply_here, feed_forward_here};
}  // namespace trinity
