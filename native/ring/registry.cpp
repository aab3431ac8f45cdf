#include "registry.h"

#include <set>

namespace trinity {

void Registry::publish(const std::vector<LayerPtr>& layers) {
  std::unique_lock<std::mutex> lock(guard_);
  std::set<LayerPtr> gone;
  for (auto& each : layers_) gone.insert(each.second);
  layers_.clear();
  for (auto& layer : layers) {
    layers_[{layer->layer, layer->version}] = layer;
    gone.erase(layer);
  }
  for (auto& layer : gone) {
    idle_.wait(lock, [&] { return layer->pins == 0; });
    retire(*layer);
  }
}

LayerPtr Registry::pin(int32_t layer, int64_t version) {
  std::lock_guard<std::mutex> lock(guard_);
  auto found = layers_.find({layer, version});
  if (found == layers_.end()) return nullptr;
  ++found->second->pins;
  return found->second;
}

void Registry::unpin(const LayerPtr& layer, const int64_t* rows) {
  std::lock_guard<std::mutex> lock(guard_);
  for (size_t e = 0; rows && e < layer->rows.size(); ++e) layer->rows[e] += rows[e];
  if (--layer->pins == 0) idle_.notify_all();
}

std::vector<RowCount> Registry::take_counts() {
  std::lock_guard<std::mutex> lock(guard_);
  for (auto& each : layers_) retire(*each.second);
  std::vector<RowCount> counts;
  for (auto& each : left_) counts.emplace_back(each.first.first, each.first.second, each.second);
  left_.clear();
  return counts;
}

// Takes over what the layer has counted; the caller holds the lock.
void Registry::retire(Layer& layer) {
  for (size_t e = 0; e < layer.rows.size(); ++e)
    if (layer.rows[e]) left_[{layer.layer, layer.experts[e]}] += std::exchange(layer.rows[e], 0);
}

}  // namespace trinity
