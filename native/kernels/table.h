// What a file compiled for one instruction set offers, and what it may use: no inline function of a library, whose code the linker
// might take for everybody from a file whose instructions not every processor has.
#pragma once
#include "kernels.h"

namespace trinity {

struct Table {
  void (*round_rows)(Format, const float *, int64_t, int64_t, void *, float *);
  void (*multiply)(const Product &, int64_t, int64_t);
  void (*feed_forward)(const FeedForward &, int64_t, int64_t);
};

extern const Table kGeneric, kAvx2, kAvx512, kAvx512Bf16;  // of x86-64 all but the first

constexpr int kColumns = 4;              // weight rows that a tile meets
constexpr int64_t kPanelBytes = 256 << 10;  // of weights that stay in a core's cache while all rows pass by

constexpr int64_t size_of(Format format) { return format == kFloat32 ? 4 : format == kBfloat16 ? 2 : 1; }
constexpr int64_t quarter_of(int64_t n) { return (n + kColumns - 1) / kColumns; }

// Tiles of a panel.
constexpr int64_t panel_of(Format format, int64_t k) {
  const int64_t tiles = kPanelBytes / (kColumns * k * size_of(format) + 1);
  return tiles < 4 ? 4 : tiles;
}

// Memory of this thread, on a boundary of 64 bytes, valid until its next call of the same number. Dies with std::bad_alloc's
// message if there is none.
constexpr int kScratches = 2;
void *scratch(int which, int64_t num_bytes);

}  // namespace trinity
