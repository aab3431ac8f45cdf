// What a shard can compute at this moment: layers of its versions, each with its kernel; and how many rows each expert has had.
//
// Decisions: Python publishes the whole list whenever it changes. Who computes holds a pin; `publish` returns when nobody computes
// any more with what is no longer on the list: then its memory may be written again.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "expert_call.h"

namespace trinity {

constexpr int32_t kNotHeld = -2;  // in the place of an expert's position

struct Layer {
  int32_t layer;
  uint32_t format;                 // of rows, as callers send them
  int64_t version, dim, hidden;
  std::vector<int64_t> experts;    // [E], numbered as in the checkpoint
  std::vector<int32_t> position;   // [X]: where in the stacks, or kNotHeld
  ExpertKernel kernel;             // none: rows come back as they are, to measure the way
  const void* stacks[9];
  std::vector<int64_t> rows;       // [E], counted under the registry's lock
  int64_t pins = 0;
};

using LayerPtr = std::shared_ptr<Layer>;
using RowCount = std::tuple<int32_t, int64_t, int64_t>;  // layer, expert, rows

class Registry {
 public:
  void publish(const std::vector<LayerPtr>& layers);
  LayerPtr pin(int32_t layer, int64_t version);  // null where it is not here
  void unpin(const LayerPtr& layer, const int64_t* rows);
  std::vector<RowCount> take_counts();

 private:
  void retire(Layer& layer);

  std::mutex guard_;
  std::condition_variable idle_;
  std::map<std::pair<int32_t, int64_t>, LayerPtr> layers_;
  std::map<std::pair<int32_t, int64_t>, int64_t> left_;  // rows by layer and expert, of layers that are gone
};

}  // namespace trinity
