// Numbers and their bits. In an unnamed namespace: another file has the same names for other instructions.
#include "table.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace trinity {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// The bits of the nearest bfloat16, halves to even.
inline uint16_t brain_of(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float rounded_to_brain(float value) { return as_float(static_cast<uint32_t>(brain_of(value)) << 16); }

// Begin to read a line of memory that is wanted soon. `i`, which is returned, is part of it so that the compiler takes this for
// arithmetic: it would keep sums in memory around a prefetch that may mean anything.
inline int64_t begin_to_read(const void *line, int64_t i) {
#if defined(__SSE__)
  asm("prefetcht1 (%1)" : "+r"(i) : "r"(line));
#else
  __builtin_prefetch(line);
#endif
  return i;
}

struct AsUsual {  // while tiles are computed
  AsUsual() {}
};

#if defined(__SSE__)
// Numbers below the smallest normal one are zeros meanwhile: vdpbf16ps has them so, and what stands in for it.
struct Flushing {
  const unsigned before = _mm_getcsr();
  Flushing() { _mm_setcsr(before | 0x8040); }
  ~Flushing() { _mm_setcsr(before); }
  Flushing(const Flushing &) = delete;
  Flushing &operator=(const Flushing &) = delete;
};
#else
using Flushing = AsUsual;  // other processors keep such numbers, here as in numba: only with these do bits differ from x86
#endif

}  // namespace
}  // namespace trinity
