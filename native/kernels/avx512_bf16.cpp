// For x86 with AVX512 and its products of bfloat16 (vdpbf16ps) and of bytes (vpdpbusd). These are written as instructions: with the
// intrinsics GCC 12 copies each sum before and after, which takes as long again.
#include "avx512.inl"

namespace trinity {
namespace {

struct BrainFormat : BrainLanes {
  static Sum add(Sum s, Weight w, Row x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(w), "v"(x));
    return s;
  }
};

struct ByteFormat : ByteParts {
  using X = uint8_t;
  using W = int8_t;
  using Total = int32_t;
  using Sum = __m512i;
  using Row = __m512i;
  using Weight = __m512i;
  using Mode = AsUsual;
  static constexpr int kRows = 4, kStep = 64, kFew = 1, kAhead = 8 << 10;
  static constexpr bool kPads = true, kRounds = false;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Row load_x(const uint8_t *p) { return _mm512_loadu_si512(p); }
  static Weight load_w(const int8_t *p) { return _mm512_loadu_si512(p); }
  static Row load_x(const uint8_t *p, int num) { return _mm512_maskz_loadu_epi8((1ull << num) - 1, p); }
  static Weight load_w(const int8_t *p, int num) { return _mm512_maskz_loadu_epi8((1ull << num) - 1, p); }
  static Sum add(Sum s, Weight w, Row x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(x), "v"(w));
    return s;
  }
  template <int R>
  static void totals(const Sum (*sums)[kColumns], int32_t *out) { _mm512_store_ps(out, added_up<Ints, R>(sums)); }
};

}  // namespace
}  // namespace trinity

#include "packed.inl"
#include "tiles.inl"

namespace trinity {
const Table kAvx512Bf16 = {round_rows_here, multiply_here, feed_forward_here};
}  // namespace trinity
