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

// Rows of one matrix each, in units that any thread may take, and the feed-forward that takes them.
class Units {
 public:
  Units(const Rows &x, const Matrix &gate, const Matrix &up, const Matrix &down, const float *weight, float *y)
      : layer_{gate.in(), x, gate.matrices(), up.matrices(), down.matrices(), weight, y, nullptr, nullptr, nullptr} {}

  void add(int64_t expert, int64_t first, int64_t last, int64_t size) {
    for (; first < last; first += size) {
      expert_.push_back(expert);
      begin_.push_back(first);
      end_.push_back(std::min(first + size, last));
    }
  }

  void seal() { layer_.expert = expert_.data(), layer_.begin = begin_.data(), layer_.end = end_.data(); }
  int64_t num() const { return static_cast<int64_t>(expert_.size()); }

  void run(int64_t first, int64_t last) const {
    if (first < last) feed_forward(layer_, first, last);
  }

 private:
  std::vector<int64_t> expert_, begin_, end_;
  FeedForward layer_;
};

int64_t unit_size(int64_t rows, int threads) {
  const int64_t share = (rows + threads - 1) / threads;
  return std::min(kMostRows, (share + kTile - 1) / kTile * kTile);
}

void add_all(const Experts &e, int threads, const Order &order, Units *units) {
  const int64_t size = unit_size(static_cast<int64_t>(order.row.size()), threads);
  for (int64_t at = 0, first = 0; at < e.num; first = order.end[at++]) units->add(at, first, order.end[at], size);
  units->seal();
}

void add_all(int threads, int64_t num, Units *units) {
  units->add(0, 0, num, unit_size(num, threads));
  units->seal();
}

void round_all(const Local &l, int threads, int64_t num, const float *from, void *to) {
  each_row(threads, num, 2 * l.down.n, [&](int64_t row) {
    pieces().rounded(l.is_brain, from + row * l.down.n, nullptr, l.down.n, at(to, row, l.down.n, l.is_brain));
  });
}

// Rows too few to be shared out: what the products give is.
void by_products(const Local &l, int threads, int64_t num, const void *x, void *y) {
  const int64_t f = l.gate.n;
  float *gate = reinterpret_cast<float *>(scratch_of<1>(num * 2 * f * 4)), *up = gate + num * f;
  char *hidden = scratch_of<0>(num * f * size_of_one(l.is_brain));
  multiply_all(threads, l.is_brain, num, x, {&l.gate, &l.up}, gate);
  each_row(threads, num, 30 * f, [&](int64_t row) {
    pieces().swiglu(l.is_brain, gate + row * f, up + row * f, f, at(hidden, row, f, l.is_brain));
  });
  float *own = reinterpret_cast<float *>(scratch_of<3>(num * l.down.n * 4));
  multiply_all(threads, l.is_brain, num, hidden, {&l.down}, own);
  round_all(l, threads, num, own, y);
}

void count(const Experts &e, const int64_t *rows) {
  if (!e.counts) return;
  for (int64_t at = 0; at < e.num; at++)
    if (rows[at]) __atomic_fetch_add(&e.counts[e.ids[at]], rows[at], __ATOMIC_RELAXED);
}

}  // namespace

void feed_forward_all(const Local &l, int threads, int64_t num, const void *x, void *y) {
  const Format format = l.gate.in();
  if (num < threads * kTile && threads > 1 && format == format_of(l.is_brain)) return by_products(l, threads, num, x, y);
  float *own = reinterpret_cast<float *>(scratch_of<1>(num * l.down.n * 4));
  Units units(rows_for(format, threads, l.is_brain, num, x, l.dim), l.gate, l.up, l.down, nullptr, own);
  add_all(threads, num, &units);
  in_threads(threads, units.num(), 6 * num * l.gate.n * l.dim, [&](int64_t first, int64_t last) { units.run(first, last); });
  round_all(l, threads, num, own, y);
}

bool experts(const Experts &e, int threads, int64_t num, const void *x, const int64_t *ids, const float *weights, void *y,
             int64_t *rows, const Local &local, void *local_y) {
  Order order;
  if (!sorted(e, num, ids, weights, rows, &order)) return false;
  const int64_t total = static_cast<int64_t>(order.row.size()), width = local.gate.values ? local.down.n : 0;
  float *parts = reinterpret_cast<float *>(scratch_of<3>(total * e.dim * 4));
  float *own = reinterpret_cast<float *>(scratch_of<1>(num * width * 4));
  Rows theirs = rows_for(e.gate.in(), threads, e.is_brain, num, x, e.dim), ours = {};
  if (width) ours = rows_for(local.gate.in(), threads, e.is_brain, num, x, e.dim);  // of one format: the same, at the same place
  theirs.at = order.row.data();
  Units units(theirs, e.gate, e.up, e.down, order.weight.data(), parts), beside(ours, local.gate, local.up, local.down, nullptr, own);
  add_all(e, threads, order, &units);
  if (width) add_all(threads, num, &beside);
  const int64_t operations = 6 * total * e.gate.n * e.dim + 6 * num * local.gate.n * width, split = beside.num();
  in_threads(threads, split + units.num(), operations, [&](int64_t first, int64_t last) {
    beside.run(first, std::min(last, split));
    units.run(std::max(first, split) - split, last - split);
  });
  if (width) round_all(local, threads, num, own, local_y);
  count(e, rows);
  in_threads(threads, num, 2 * num * e.top_k * e.dim, [&](int64_t first, int64_t last) {
    std::vector<int64_t> places;
    std::vector<const float *> found;
    for (int64_t row = first; row < last; row++) {
      places.assign(&order.place[row * e.top_k], &order.place[row * e.top_k] + e.top_k);
      std::sort(places.begin(), places.end());
      found.clear();
      for (int64_t place : places)
        if (place >= 0) found.push_back(parts + place * e.dim);
      pieces().summed(e.is_brain, found.data(), static_cast<int64_t>(found.size()), e.dim, at(y, row, e.dim, e.is_brain));
    }
  });
  return true;
}

}  // namespace trinity
