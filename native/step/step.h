// Pieces of a layer of any family around its experts: what is computed of rows before attention, in it, after it, and after the
// experts. A family's description (trinity/models/common/native_step.py) says which matrices and norms there are.
//
// Legend: T tokens, D model, H query heads, G key-value heads, d head dim, E experts, K top-k.
// Numbers are float32 or the bits of bfloat16 (`brain`), as the model's; every operation is rounded where torch rounds it. The
// bits are those of the modules in trinity/models/common: products as trinity/ops makes them (kernels.h), a norm's mean in the
// order of torch's sums, top-k by the standard library's algorithms that torch calls.
// Fields are 8 bytes each, because Python packs them. Addresses are the caller's to keep; nothing is checked here.
#pragma once
#include <stdint.h>

#include "../kernels/kernels.h"

namespace trinity {

struct Norm {            // RMS; weight null: none
  const void *weight;
  double eps;
  int64_t rounds_first;  // to the rows' type, before the gain
};

struct Matrix {          // [n, k], or a stack of them; values null: none
  const void *values, *bias;
  const float *scale;    // of int8, fp8 and nvfp4, as kernels.h has them; and so
  const void *more;      // of int8 and nvfp4
  int64_t n, k, format;  // of kernels.h
  Format in() const { return static_cast<Format>(format); }
  Matrices matrices() const { return {values, scale, more, n, k}; }
};

struct Project {
  int64_t is_brain, dim, head_dim, rotated;  // numbers of a head that are rotated, in halves
  Norm input, query, key;
  Matrix q, k, v, gate;
};

struct Attend {          // of single tokens, whose keys are written before any is read
  int64_t is_brain, stored;              // what keys and values are kept in: kFloat32 or kBfloat16 as the rows, kInt8
  int64_t heads, groups, dim, window;    // 0: every earlier token is seen
  int64_t size, columns;                 // tokens of a block, and blocks of a row of the table
  const int32_t *block;                  // [.., columns]: position p of a row is in its block p / size
};

struct Tokens {          // [T]: whose line of the table each has, and its position
  int64_t num;
  const int64_t *row, *position;
};

struct Kept {            // of a layer [P, G, d], and of int8 a scale for each [P, G]
  void *keys, *values;
  float *key_scale, *value_scale;
};

enum Scoring : int64_t { kPythons = 0, kSigmoid = 1, kSoftmax = 2 };  // what makes scores of logits

struct Route {
  int64_t is_brain, dim, width;  // of attention's result
  Norm after, next;
  Matrix out, router;
  int64_t scoring, top_k, num_groups, top_groups, normalises;
  const float *choice_bias;      // [E] or null
  double scale;
};

struct Leave {
  int64_t is_brain, dim;
  Norm after;
};

struct Routed {                  // float32 [T, E] twice, int64 [T, K], float32 [T, K]; the last three unless scoring is Python's
  float *logits, *scores;
  int64_t *ids;
  float *weights;
};

struct Experts {                 // those of a layer that are here
  int64_t is_brain, dim, num, top_k;
  Matrix gate, up, down;         // [num, hidden, dim] twice, [num, dim, hidden]; of one format, without bias; null: they are elsewhere
  const int64_t *position;       // by id: which of them, -1 (also of the id -1, which the last entry is for): somebody else's, -2: nobody's
  int64_t last;                  // entry of `position`
  const int64_t *ids;            // [num]
  int64_t *counts;               // by id: rows so far, for who looks now and then; null: nobody counts
};

struct Local {                   // a feed-forward that every row goes through; values null: none
  int64_t is_brain, dim;
  Matrix gate, up, down;
};

struct Ending {                  // after the last layer
  int64_t is_brain, dim;
  Norm norm;
  Matrix head;
};

void project(const Project &what, int threads, int64_t num, const void *h, const void *cos, const void *sin, void *q, void *k,
             void *v, void *gate);
void attend(const Attend &what, int threads, const Tokens &tokens, const void *q, const void *k, const void *v, const Kept &kept,
            void *out);
void route(const Route &what, int threads, int64_t num, const void *mixed, const void *gate, const void *h, void *residual,
           void *x, const Routed &routed);
void leave(const Leave &what, int threads, int64_t num, const void *residual, const void *routed, const void *local, void *h);
void choose(const Route &what, int64_t num, const Routed &routed);  // what `route` does with logits that are there

// y [T, D] of the rows' experts that are here, zeros where there are none, and rows [num] of each; beside them `local`'s [T, D].
// false: an expert is nobody's.
bool experts(const Experts &what, int threads, int64_t num, const void *x, const int64_t *ids, const float *weights, void *y,
             int64_t *rows, const Local &local, void *local_y);
void feed_forward_all(const Local &what, int threads, int64_t num, const void *x, void *y);
void finish(const Ending &what, int threads, int64_t num, const void *h, void *hidden, void *logits);  // logits null: not wanted
// The first of the highest numbers of each row [T, n], and that number; NaN is the highest.
void highest(bool is_brain, int threads, int64_t num, int64_t n, const void *x, int64_t *at, float *found);

// What a file compiled for one instruction set has.
struct Pieces {
  void (*norm)(const Norm &, bool is_brain, const void *x, int64_t dim, void *y);
  void (*heads)(const Project &, const Norm &, const Matrix &, bool rotates, const float *y, const void *cos, const void *sin, void *to);
  void (*keep)(const Attend &, const void *from, int64_t slot, void *to, float *scale);  // a token's keys or values
  void (*attend)(const Attend &, const Tokens &, const void *q, const Kept &, void *out, int64_t unit);
  int64_t (*highest)(bool is_brain, const void *x, int64_t n, float *found);
  // y [num, n] in float32 = x [num, k] times w [n, k], of up to four rows, both widened first
  void (*wide_product)(bool is_brain, const void *x, int64_t num, int64_t k, const void *w, int64_t n, float *y);
  void (*rounded)(bool is_brain, const float *y, const void *bias, int64_t n, void *to);
  void (*gated)(bool is_brain, const void *x, const void *gate, int64_t n, void *to);
  void (*added)(bool is_brain, const void *x, const void *y, int64_t n, void *to);
  void (*sigmoid)(const float *x, int64_t n, float *to);
  void (*softmax)(const float *x, int64_t n, float *to);
  void (*swiglu)(bool is_brain, const float *gate, const float *up, int64_t n, void *to);  // each rounded first
  void (*summed)(bool is_brain, const float *const *rows, int64_t num, int64_t n, void *to);  // each rounded first
  float (*total)(const float *x, int64_t n);
};

extern const Pieces kPiecesGeneric, kPiecesAvx2, kPiecesAvx512;

}  // namespace trinity
