// A step of a whole model: its layers one after the other, from a place on, until it is done or Python has to do a part.
//
// Legend: T tokens, D model, E experts, K top-k, L layers, M those of them that route, V vocabulary.
// Python packs what is here (trinity/models/common/native_model.py): a description of the layers that holds while no weight moves,
// and the memory of one pass. Nothing of a pass is kept here: whoever goes on says from where.
#pragma once
#include "step.h"

namespace trinity {

// Places in a layer, in their order; what Python does at those that say so, it does before it goes on at the next.
enum Place : int64_t {
  kEnter,    // Python's: the whole layer, from h to h
  kAttend,   // Python's: mixed = attention(q, k, v)
  kRoute,
  kChoose,   // Python's: scores, ids and weights, from logits
  kExperts,  // Python's: the rows' leaving
  kLocal,
  kJoin,     // Python's: y
  kLeave,
  kPlaces
};

struct Layer {
  Project project;
  Route route;
  Leave leave;
  Local local;
  int64_t is_whole;  // Python's
};

struct Memory {      // keys and values of a layer; attend negative: attention is Python's
  int64_t attend;    // which of the pass
  void *keys, *values;
};

struct Run {         // of one pass; one row after the other
  int64_t num, threads;
  const void *cos, *sin;
  void *h, *residual, *x, *q, *k, *v, *gate, *mixed, *local, *y;  // as wide as the widest layer wants them
  void *hidden, *logits;
  Routed routed;     // [M, ..]
};

struct Step {
  const Layer *layers;
  int64_t num_layers;
  const Head *head;
  const Experts *experts;  // [L]
  const Attend *attends;
  const Memory *memory;    // [L], or null
  const Run *run;
};

// From a place on: layer * kPlaces + place. -> the place that Python has to see to, or num_layers * kPlaces: all is done.
int64_t go(const Step &step, int64_t at);

}  // namespace trinity
