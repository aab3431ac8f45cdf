// The experts of a layer that are here: rows sorted by expert, feed-forwards, and each row's sum in the order of its experts.
#include <algorithm>
#include <vector>

#include "crew.h"
#include "parts.h"

namespace trinity {

namespace {

constexpr int64_t kMostRows = 64, kTile = 4;  // of a unit, and of the kernels

struct Order {  // slots of rows, sorted by expert; equal ones as they come
  std::vector<int64_t> row, place, end;  // [A]; [T * K]: where a slot is in the order, -1: elsewhere; [E]
  std::vector<float> weight;
};

bool sorted(const Experts &e, int64_t num, const int64_t *ids, const float *weights, int64_t *rows, Order *order) {
  const int64_t slots = num * e.top_k;
  order->place.assign(slots, -1);
  std::fill_n(rows, e.num, 0);
  for (int64_t slot = 0; slot < slots; slot++) {
    const int64_t at = e.position[ids[slot] < 0 || ids[slot] > e.last ? e.last : ids[slot]];
    if (at < -1) return false;
    if (at < 0) continue;
    order->place[slot] = at;
    rows[at]++;
  }
  order->end.assign(rows, rows + e.num);
  for (int64_t at = 1; at < e.num; at++) order->end[at] += order->end[at - 1];
  const int64_t total = e.num ? order->end.back() : 0;
  std::vector<int64_t> next(e.num);
  for (int64_t at = 0; at < e.num; at++) next[at] = order->end[at] - rows[at];
  order->row.resize(total);
  order->weight.resize(total);
  for (int64_t slot = 0; slot < slots; slot++) {
    int64_t &place = order->place[slot];
    if (place < 0) continue;
    place = next[place]++;
    order->row[place] = slot / e.top_k;
    order->weight[place] = weights[slot];
  }
  return true;
}

void feed_forwards(const Experts &e, int threads, const Rows &x, const Order &order, float *y) {
  const int64_t total = static_cast<int64_t>(order.row.size()), share = (total + threads - 1) / threads;
  const int64_t size = std::min(kMostRows, (share + kTile - 1) / kTile * kTile);
  std::vector<int64_t> expert, begin, end;
  for (int64_t at = 0, first = 0; at < e.num; at++)
    for (; first < order.end[at]; first = end.back()) {
      expert.push_back(at);
      begin.push_back(first);
      end.push_back(std::min(first + size, order.end[at]));
    }
  const FeedForward layer = {e.gate.in(),
                             {x.values, x.scale, order.row.data()},
                             e.gate.matrices(),
                             e.up.matrices(),
                             e.down.matrices(),
                             order.weight.data(),
                             y,
                             expert.data(),
                             begin.data(),
                             end.data()};
  in_threads(threads, static_cast<int64_t>(expert.size()), 6 * total * e.gate.n * e.dim,
             [&](int64_t first, int64_t last) { feed_forward(layer, first, last); });
}

}  // namespace

bool experts(const Experts &e, int threads, int64_t num, const void *x, const int64_t *ids, const float *weights, void *y,
             int64_t *rows) {
  Order order;
  if (!sorted(e, num, ids, weights, rows, &order)) return false;
  float *parts = reinterpret_cast<float *>(scratch_of<3>(static_cast<int64_t>(order.row.size()) * e.dim * 4));
  if (!order.row.empty()) feed_forwards(e, threads, rows_for(e.gate.in(), threads, e.is_brain, num, x, e.dim), order, parts);
  in_threads(threads, num, 2 * num * e.top_k * e.dim, [&](int64_t first, int64_t last) {
    std::vector<int64_t> places;
    std::vector<const float *> own;
    for (int64_t row = first; row < last; row++) {
      places.assign(&order.place[row * e.top_k], &order.place[row * e.top_k] + e.top_k);
      std::sort(places.begin(), places.end());
      own.clear();
      for (int64_t place : places)
        if (place >= 0) own.push_back(parts + place * e.dim);
      pieces().summed(e.is_brain, own.data(), static_cast<int64_t>(own.size()), e.dim, at(y, row, e.dim, e.is_brain));
    }
  });
  return true;
}

}  // namespace trinity
