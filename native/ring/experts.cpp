#include "experts.h"

#include <algorithm>
#include <vector>

#include "rows.h"

namespace trinity {

namespace {

constexpr int64_t kMostRows = 64;  // of a unit, as in trinity/ops/batch_invariant/fused_mlp.py

// The call's rows in a format; valid until this thread's next call. Formats of rows have kernels.h's numbers.
Rows rows_in(Format format, const ExpertCall* call) {
  const bool is_brain = call->rows == kBfloat16;
  if (format == format_of(is_brain)) return {call->x, nullptr, call->row};
  thread_local std::vector<char> memory;
  memory.resize(bytes_of_rows(format, call->num_rows, call->dim));
  for (int64_t row = 0; row < call->num_rows; ++row) put_row(format, is_brain, call->x, row, call->num_rows, call->dim, memory.data());
  Rows rows = rows_at(format, memory.data(), call->num_rows);
  rows.at = call->row;
  return rows;
}

Matrices matrices_of(const ExpertCall* call, int at, int64_t n, int64_t k) {
  return {call->stacks[at], static_cast<const float*>(call->stacks[3 + at]), call->stacks[6 + at], n, k};
}

template <Format format>
void compute(const ExpertCall* call) {
  thread_local std::vector<int64_t> expert, begin, end;
  expert.clear(), begin.clear(), end.clear();
  for (int64_t e = 0, first = 0; e < call->num_experts; ++e)
    for (; first < call->end[e]; first = end.back()) {
      expert.push_back(e), begin.push_back(first);
      end.push_back(std::min(first + kMostRows, call->end[e]));
    }
  FeedForward layer = {};
  layer.format = format;
  layer.x = rows_in(rows_of(format), call);
  layer.gate = matrices_of(call, 0, call->hidden, call->dim);
  layer.up = matrices_of(call, 1, call->hidden, call->dim);
  layer.down = matrices_of(call, 2, call->dim, call->hidden);
  layer.weight = call->weight, layer.y = call->y;
  layer.expert = expert.data(), layer.begin = begin.data(), layer.end = end.data();
  feed_forward(layer, 0, static_cast<int64_t>(expert.size()));
}

}  // namespace

ExpertKernel experts_in(uint32_t format) {
  constexpr ExpertKernel kernels[] = {compute<kFloat32>, compute<kBfloat16>, compute<kInt8>, compute<kFp8>, compute<kNvfp4>};  // by format
  return format <= kNvfp4 ? kernels[format] : nullptr;
}

}  // namespace trinity
