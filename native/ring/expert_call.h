// One layer's experts for some rows: what a service thread asks of a kernel, and the one type that a kernel is known by.
//
// Legend: R rows, A assignments (row, expert) in the order of their experts, E experts of the layer on this shard, D model,
// F expert hidden. The rows of y are rounded once, by who adds them up.
#pragma once
#include <cstdint>

namespace trinity {

struct ExpertCall {
  int64_t num_rows, num_assigned, num_experts, dim, hidden;
  uint32_t rows;          // format of x, of layout.h
  const void* x;          // [R, D]
  const int64_t* row;     // [A]
  const int64_t* end;     // [E]: assignments of expert e are end[e - 1] <= a < end[e], of the first from 0 on
  const float* weight;    // [A]: hidden rows are multiplied by it
  const void* stacks[9];  // gate [E, F, D], up [E, F, D], down [E, D, F]; of some formats scales and more, too: see kernels.h
  float* y;               // [A, D], to be written: a row for each assignment, which the caller adds up
};

// Called on threads that Python does not know, without its lock; throws nothing.
using ExpertKernel = void (*)(const ExpertCall*);

}  // namespace trinity
