#include "experts.h"

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"

namespace trinity {

namespace {

constexpr int64_t kMostRows = 64;  // of a unit, as in trinity/ops/batch_invariant/fused_mlp.py

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
  layer.x = {call->x, nullptr, call->row};
  layer.gate = {call->stacks[0], nullptr, nullptr, call->hidden, call->dim};
  layer.up = {call->stacks[1], nullptr, nullptr, call->hidden, call->dim};
  layer.down = {call->stacks[2], nullptr, nullptr, call->dim, call->hidden};
  layer.weight = call->weight, layer.y = call->y;
  layer.expert = expert.data(), layer.begin = begin.data(), layer.end = end.data();
  feed_forward(layer, 0, static_cast<int64_t>(expert.size()));
}

}  // namespace

// The formats of kernels.h and of layout.h have the same numbers.
ExpertKernel experts_in(uint32_t format) { return format == kFloat32 ? compute<kFloat32> : format == kBfloat16 ? compute<kBfloat16> : nullptr; }

}  // namespace trinity
