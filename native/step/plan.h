// A step of a whole model: its layers one after the other, from a place on, until it is done or Python has to do a part.
//
// Legend: T tokens, D model, E experts, K top-k, L layers, M those of them that route, V vocabulary.
// Python packs what is here (trinity/models/common/native_model.py): a description of the layers that holds while no weight moves,
// and the memory of one pass. Nothing of a pass is kept here: whoever goes on says from where.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "step.h"

namespace trinity {

struct Plan;  // native/ring/caller.h: where a layer's rows go

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

struct StepLayer {
  Project project;
  Route route;
  Leave leave;
  Local local;
  int64_t number;    // that shards know it by
  int64_t is_whole;  // Python's
};

struct Memory {      // keys and values of a layer
  int64_t attend;    // which of the pass
  Kept kept;
};

struct Run {         // of one pass; one row after the other
  int64_t num, threads;
  const void *cos, *sin;
  void *h, *residual, *x, *q, *k, *v, *gate, *mixed, *local, *y;  // as wide as the widest layer wants them
  void *hidden, *logits;
  Routed routed;     // [M, ..]
  const int64_t *row, *position;  // [T]; null where attention is Python's
  double *waited_s;  // [L]: from rows' leaving to their coming back by rings; null where there are none
};

struct Near {        // layers whose experts are at shards that are reached by rings
  std::vector<std::shared_ptr<Plan>> plans;  // [L], or none at all; null: elsewhere
  std::string name;  // of the caller; a call's is that and its number, as trinity/rpc/messages.py:op_name has it
  int64_t first_op = 0, version = 0, priority = 0;
  double left_s = 0;  // for a layer's rows
};

struct Step {
  const StepLayer *layers;
  int64_t num_layers;
  const Ending *head;
  const Experts *experts;  // [L]
  const Attend *attends;
  const Memory *memory;    // [L], or null
  const Run *run;
  Near near;
};

struct Stop {
  int64_t at;       // the place that Python has to see to, or num_layers * kPlaces: all is done
  int64_t failure;  // at kExperts and kJoin: why rings were of no use, as ring_finish says it; 0: they were not asked
};

Stop go(const Step &step, int64_t at);  // from a place on: layer * kPlaces + place

}  // namespace trinity
