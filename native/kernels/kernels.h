// Rows times matrices and whole feed-forwards on a CPU, in five formats of weights: what the other parts of the extension call.
//
// Legend: A rows sorted by expert, E experts (1 for a dense layer), N outputs, K inner dimension, F hidden.
// A row's bits depend on the row and the weights alone: not on how many rows there are, on threads, or on the processor. They
// are those of trinity/ops: `batch_invariant` for float32 and bfloat16, `quantised` for int8, which say how sums are taken.
// Weights are used as they are stored, rows of K; nothing is checked here: who calls says what is where, and keeps it alive.
// Work is cut into units that any thread may do, in any order; nothing here starts a thread or keeps one.
#pragma once
#include <stdint.h>

#include "../cpu.h"

namespace trinity {

enum Format : int32_t {
  kFloat32 = 0,
  kBfloat16 = 1,
  kInt8 = 2,
  kFp8 = 3,   // e4m3 with a scale for each 128 x 128; rows and products are float32's
  kNvfp4 = 4  // two e2m1 a byte, the first one lowest, with a scale in e4m3 for each 16 of a row; the same
};

constexpr Format rows_of(Format format) { return format == kFp8 || format == kNvfp4 ? kFloat32 : format; }  // what rows are rounded to

struct Matrices {        // [E, N, K]
  const void *values;  // float32, the bits of bfloat16, int8, e4m3, or [E, N, K / 2] of e2m1
  const float *scale;  // [E, N] of int8; [E, N / 128, K / 128], rounded up, of fp8; [E] of nvfp4: its scales are divided by it
  const void *more;    // of int8: int32 [E, N], the sums of their rows; of nvfp4: e4m3 [E, N, K / 16]
  int64_t n, k;
};

struct Rows {           // [.., K], as `round_rows` makes them for a format
  const void *values;   // float32, the bits of bfloat16, or uint8 that are int8 + 128
  const float *scale;   // of uint8, one a row
  const int64_t *at;    // row a is values[at[a]]; none: values[a]
};

struct Product {
  Format format;
  Rows x;
  Matrices w;
  const int64_t *end;  // [E]: the rows of matrix e are end[e - 1] <= a < end[e], of the first from 0 on
  float *y;            // row a at y + a * y_step
  int64_t y_step;
};

struct FeedForward {
  Format format;
  Rows x;
  Matrices gate, up, down;             // [E, F, K], [E, F, K], [E, N, F]
  const float *weight;                 // [A], hidden rows are multiplied by it; none: by one
  float *y;                            // [A, N]
  const int64_t *expert, *begin, *end; // of a unit: rows begin <= a < end, all of one expert; 64 and fewer are best
};

// float32 rows [num, k] as a format multiplies them; `scale`: see Rows.
void round_rows(Format format, const float *x, int64_t num, int64_t k, void *values, float *scale);

// Units of a matrix [n, k]: unit u is part u % units_of(..) of matrix u / units_of(..), for all of its rows.
int64_t units_of(Format format, int64_t n, int64_t k);
void multiply(const Product &product, int64_t first, int64_t last);

// down(weight * silu(gate x) * up x); bfloat16 rounds gate x, up x and the hidden rows to bfloat16. y is float32, not rounded.
void feed_forward(const FeedForward &layer, int64_t first, int64_t last);

// Leave out instructions beyond these from now on, for tests and measurements.
void use(Isa);

}  // namespace trinity
