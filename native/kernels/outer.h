// Products whose second factor is read row by row, added to what is there: gradients of rows and of matrices, in training.
//
// Legend: R rows sorted by matrix, E matrices, K inner dimension, N outputs, A and B widths of two kinds of rows.
// Sums are taken in turn, kRun terms (of bfloat16 pairs of terms) at a time, each run's sum being added to what is there: the
// order of trinity/ops/batch_invariant/outer.py, whose functions these stand for. Sums are float32 whatever the factors are.
#pragma once
#include "kernels.h"

namespace trinity {

constexpr int64_t kRun = 128;
constexpr int64_t kUnitRows = 256;  // of the result: as many as a unit has

struct AddedProducts {   // out[r] += p[r] v[e] for the rows r of matrix e
  Format format;         // float32 or bfloat16, of p and v
  const void *p;         // [R, K], row r at p + r * p_step
  const void *v;         // [E, K, N]
  const int64_t *end;    // [E]: see Product
  float *out;            // [R, N]
  int64_t p_step, k, n;
  bool is_new;           // out is written, not added to
};

struct RowSums {         // out[e] += a^T b over the rows of matrix e
  Format format;
  const void *a, *b;     // [R, A], [R, B], row r at a + r * a_step
  const int64_t *end;
  float *out;            // [E, A, B]
  int64_t a_step, b_step, a_width, b_width;
  bool is_new;
};

// Say whether this processor has the instructions that the format takes.
bool has_outer(Format format);

// Unit u is the rows from u % num_units * kUnitRows on (of the matrix's rows, or of out[e]) of matrix u / num_units.
void add_products(const AddedProducts &products, int64_t num_units, int64_t first, int64_t last);
void add_row_sums(const RowSums &sums, int64_t num_units, int64_t first, int64_t last);

struct OuterTable {
  void (*add_products)(const AddedProducts &, int64_t, int64_t, int64_t);
  void (*add_row_sums)(const RowSums &, int64_t, int64_t, int64_t);
};

extern const OuterTable kOuterAvx512, kOuterAvx512Bf16;

}  // namespace trinity
