// Rows of a model's type, float32 or the bits of bfloat16, as matrices of another format take them.
#pragma once
#include <string.h>

#include <vector>

#include "kernels/kernels.h"

namespace trinity {

constexpr Format format_of(bool is_brain) { return is_brain ? kBfloat16 : kFloat32; }

// Memory for rows of a format: their scales, and from a multiple of 64 bytes on their values. A format here is one that rows have,
// see `rows_of`.
constexpr int64_t bytes_of_scales(int64_t num) { return (4 * num + 63) / 64 * 64; }
constexpr int64_t bytes_of_one(Format format) { return format == kFloat32 ? 4 : format == kBfloat16 ? 2 : 1; }
constexpr int64_t bytes_of_rows(Format format, int64_t num, int64_t k) { return bytes_of_scales(num) + num * k * bytes_of_one(format); }

inline Rows rows_at(Format format, const char *memory, int64_t num) {
  return {memory + bytes_of_scales(num), format == kInt8 ? reinterpret_cast<const float *>(memory) : nullptr, nullptr};
}

// Fills in one of `num` rows, which may be done by any thread.
inline void put_row(Format format, bool is_brain, const void *x, int64_t row, int64_t num, int64_t k, char *memory) {
  static thread_local std::vector<float> wide;
  const float *from = static_cast<const float *>(x) + row * k;
  if (is_brain) {
    wide.resize(k);
    for (int64_t i = 0; i < k; i++) {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(x)[row * k + i]) << 16;
      memcpy(wide.data() + i, &bits, sizeof bits);
    }
    from = wide.data();
  }
  char *to = memory + bytes_of_scales(num) + row * k * bytes_of_one(format);
  round_rows(format, from, 1, k, to, reinterpret_cast<float *>(memory) + row);
}

}  // namespace trinity
