// What the files that put the pieces together share.
#pragma once
#include <functional>
#include <vector>

#include "../cpu.h"
#include "../rows.h"
#include "step.h"

namespace trinity {

inline const Pieces &pieces_of(Isa isa) {
  return isa >= Isa::avx512 ? kPiecesAvx512 : isa == Isa::avx2 ? kPiecesAvx2 : kPiecesGeneric;
}

inline const Pieces *&chosen_pieces() {  // once; tests choose others
  static const Pieces *found = &pieces_of(isa());
  return found;
}

inline const Pieces &pieces() { return *chosen_pieces(); }

inline int64_t size_of_one(bool is_brain) { return is_brain ? 2 : 4; }

template <class T>
T *at(T *rows, int64_t row, int64_t width, bool is_brain) {
  return rows ? (T *)((uintptr_t)rows + row * width * size_of_one(is_brain)) : nullptr;
}

// x [num, k] times each of the matrices, whatever their formats -> y, one result [num, n] after the other.
void multiply_all(int threads, bool is_brain, int64_t num, const void *x, const std::vector<const Matrix *> &matrices, float *y);
void each_row(int threads, int64_t num, int64_t operations, const std::function<void(int64_t)> &work);

// Memory of this thread that its next calls use again.
template <int which>
char *scratch_of(int64_t num_bytes) {
  static thread_local std::vector<char> memory;
  if (static_cast<int64_t>(memory.size()) < num_bytes) memory.resize(num_bytes);
  return memory.data();
}

// x [num, k] of the model's type as matrices of a format take it: for them to be multiplied with, before the next call.
Rows rows_for(Format matrices, int threads, bool is_brain, int64_t num, const void *x, int64_t k);

}  // namespace trinity
