// Products of many rows whose sums are rounded where they are made, and feed-forwards in training, which keep for the backward what
// lies between. The bits are those of kernels.h, then rounded.
//
// Legend: A rows sorted by matrix, E matrices, K inner dimension, F hidden, N outputs.
#pragma once
#include "kernels.h"

namespace trinity {

struct RoundedProduct {
  Format format;       // float32 or bfloat16, of all three
  const void *x, *w;   // [A, K], [E, N, K]
  const int64_t *end;  // [E]: see Product
  void *y;             // [A, N]
  int64_t k, n;
};

struct KeptForward {
  Format format;
  const void *x, *gate, *up, *down;     // [A, K], [E, F, K] twice, [E, N, F]
  const float *weight;                  // [A]: hidden rows are multiplied by it
  const int64_t *expert, *begin, *end;  // of a unit: rows begin <= a < end, all of one expert
  void *gated, *upped, *y;              // [A, F] twice, x by gate and by up; [A, N]
  int64_t k, f, n;
};

constexpr int64_t kSomeRows = 192;  // of a unit: what is made of them stays in a core's cache

// Unit u is the rows from u % num_units * kSomeRows on of matrix u / num_units. For what `has_outer` says yes to.
void multiply_rounded(const RoundedProduct &product, int64_t num_units, int64_t first, int64_t last);
void forward_and_keep(const KeptForward &kept, int64_t first, int64_t last);

struct KeptTable {
  void (*multiply_rounded)(const RoundedProduct &, int64_t, int64_t, int64_t);
  void (*forward_and_keep)(const KeptForward &, int64_t, int64_t);
};

extern const KeptTable kKeptAvx512, kKeptAvx512Bf16;

}  // namespace trinity
