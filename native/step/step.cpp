#include "step.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "crew.h"
#include "parts.h"

namespace trinity {

void each_row(int threads, int64_t num, int64_t operations, const std::function<void(int64_t)> &work) {
  in_threads(threads, num, num * operations, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) work(row);
  });
}

void multiply_all(int threads, bool is_brain, int64_t num, const void *x, const std::vector<const Matrix *> &matrices, float *y) {
  Rows rows[3] = {};  // by their format
  std::vector<Product> products;
  std::vector<int64_t> end{0};
  int64_t width = 0;
  for (const Matrix *m : matrices) {
    Rows &own = rows[rows_of(m->in())];
    if (!own.values) own = rows_for(m->in(), threads, is_brain, num, x, m->k);
    products.push_back({m->in(), own, m->matrices(), &num, y + num * width, m->n});
    end.push_back(end.back() + units_of(m->in(), m->n, m->k));
    width += m->n;
  }
  in_threads(threads, end.back(), 2 * num * width * matrices[0]->k, [&](int64_t first, int64_t last) {
    for (size_t i = 0; i < products.size(); i++) {
      const int64_t from = std::max(first, end[i]), to = std::min(last, end[i + 1]);
      if (from < to) multiply(products[i], from - end[i], to - end[i]);
    }
  });
}

Rows rows_for(Format matrices, int threads, bool is_brain, int64_t num, const void *x, int64_t k) {
  const Format format = rows_of(matrices);
  if (format == format_of(is_brain)) return {x, nullptr, nullptr};
  const int64_t room = bytes_of_rows(format, num, k);
  char *memory = format == kInt8 ? scratch_of<4>(room) : scratch_of<5>(room);
  each_row(threads, num, 8 * k, [&](int64_t row) { put_row(format, is_brain, x, row, num, k, memory); });
  return rows_at(format, memory, num);
}

void project(const Project &p, int threads, int64_t num, const void *h, const void *cos, const void *sin, void *q, void *k,
             void *v, void *gate) {
  const bool is_brain = p.is_brain;
  const int64_t width = p.q.n + p.k.n + p.v.n + p.gate.n;
  char *x = scratch_of<0>(num * p.dim * size_of_one(is_brain));
  float *y = reinterpret_cast<float *>(scratch_of<1>(num * width * 4));
  each_row(threads, num, 4 * p.dim, [&](int64_t row) {
    pieces().norm(p.input, is_brain, at(h, row, p.dim, is_brain), p.dim, at(x, row, p.dim, is_brain));
  });
  std::vector<const Matrix *> matrices{&p.q, &p.k, &p.v};
  if (p.gate.values) matrices.push_back(&p.gate);
  multiply_all(threads, is_brain, num, x, matrices, y);
  const float *yk = y + num * p.q.n, *yv = yk + num * p.k.n, *yg = yv + num * p.v.n;
  each_row(threads, num, 20 * width, [&](int64_t row) {
    const void *c = at(cos, row, p.rotated, is_brain), *s = at(sin, row, p.rotated, is_brain);
    pieces().heads(p, p.query, p.q, p.rotated, y + row * p.q.n, c, s, at(q, row, p.q.n, is_brain));
    pieces().heads(p, p.key, p.k, p.rotated, yk + row * p.k.n, c, s, at(k, row, p.k.n, is_brain));
    pieces().rounded(is_brain, yv + row * p.v.n, p.v.bias, p.v.n, at(v, row, p.v.n, is_brain));
    if (p.gate.values) pieces().rounded(is_brain, yg + row * p.gate.n, p.gate.bias, p.gate.n, at(gate, row, p.gate.n, is_brain));
  });
}

void attend(const Attend &a, int threads, const Tokens &t, const void *q, const void *k, const void *v, const Kept &kept, void *out) {
  const int64_t width = a.groups * a.dim;
  int64_t seen = 0;
  for (int64_t i = 0; i < t.num; i++) {
    const int64_t position = t.position[i], slot = a.block[t.row[i] * a.columns + position / a.size] * a.size + position % a.size;
    pieces().keep(a, at(k, i, width, a.is_brain), slot, kept.keys, kept.key_scale);
    pieces().keep(a, at(v, i, width, a.is_brain), slot, kept.values, kept.value_scale);
    seen += a.window ? std::min(position + 1, a.window) : position + 1;
  }
  in_threads(threads, t.num * a.groups, 4 * a.heads * a.dim * seen, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; unit++) pieces().attend(a, t, q, kept, out, unit);
  });
}

void route(const Route &r, int threads, int64_t num, const void *mixed, const void *gate, const void *h, void *residual, void *x,
           const Routed &routed) {
  const bool is_brain = r.is_brain;
  char *gated = scratch_of<0>(num * r.width * size_of_one(is_brain)), *rounded = scratch_of<2>(num * r.dim * size_of_one(is_brain));
  float *y = reinterpret_cast<float *>(scratch_of<1>(num * r.dim * 4));
  if (gate)
    each_row(threads, num, 20 * r.width, [&](int64_t row) {
      pieces().gated(is_brain, at(mixed, row, r.width, is_brain), at(gate, row, r.width, is_brain), r.width,
                     at(gated, row, r.width, is_brain));
    });
  multiply_all(threads, is_brain, num, gate ? gated : mixed, {&r.out}, y);
  each_row(threads, num, 12 * r.dim, [&](int64_t row) {
    void *own = at(rounded, row, r.dim, is_brain), *sum = at(residual, row, r.dim, is_brain);
    pieces().rounded(is_brain, y + row * r.dim, r.out.bias, r.dim, own);
    if (r.after.weight) pieces().norm(r.after, is_brain, own, r.dim, own);
    pieces().added(is_brain, at(h, row, r.dim, is_brain), own, r.dim, sum);
    pieces().norm(r.next, is_brain, sum, r.dim, at(x, row, r.dim, is_brain));
  });
  if (!r.router.values) return;
  constexpr int64_t kRows = 4;
  in_threads(threads, (num + kRows - 1) / kRows, 2 * num * r.dim * r.router.n, [&](int64_t first, int64_t last) {
    for (int64_t row = first * kRows; row < std::min(num, last * kRows); row += kRows)
      pieces().wide_product(is_brain, at(x, row, r.dim, is_brain), std::min(kRows, num - row), r.dim, r.router.values,
                            r.router.n, routed.logits + row * r.router.n);
  });
  if (r.scoring != kPythons) choose(r, num, routed);
}

void leave(const Leave &l, int threads, int64_t num, const void *residual, const void *routed, const void *local, void *h) {
  const bool is_brain = l.is_brain;
  char *sums = scratch_of<0>(num * l.dim * size_of_one(is_brain));
  each_row(threads, num, 6 * l.dim, [&](int64_t row) {
    const void *y = at(routed, row, l.dim, is_brain);
    void *sum = at(sums, row, l.dim, is_brain);
    if (local) {
      pieces().added(is_brain, at(local, row, l.dim, is_brain), y, l.dim, sum);
      y = sum;
    }
    if (l.after.weight) {
      pieces().norm(l.after, is_brain, y, l.dim, sum);
      y = sum;
    }
    pieces().added(is_brain, at(residual, row, l.dim, is_brain), y, l.dim, at(h, row, l.dim, is_brain));
  });
}

void finish(const Ending &f, int threads, int64_t num, const void *h, void *hidden, void *logits) {
  const bool is_brain = f.is_brain;
  each_row(threads, num, 4 * f.dim, [&](int64_t row) {
    pieces().norm(f.norm, is_brain, at(h, row, f.dim, is_brain), f.dim, at(hidden, row, f.dim, is_brain));
  });
  if (!logits) return;
  const bool is_direct = !is_brain && !f.head.bias;
  float *y = is_direct ? static_cast<float *>(logits) : reinterpret_cast<float *>(scratch_of<1>(num * f.head.n * 4));
  multiply_all(threads, is_brain, num, hidden, {&f.head}, y);
  if (is_direct) return;
  each_row(threads, num, 2 * f.head.n, [&](int64_t row) {
    pieces().rounded(is_brain, y + row * f.head.n, f.head.bias, f.head.n, at(logits, row, f.head.n, is_brain));
  });
}

void highest(bool is_brain, int threads, int64_t num, int64_t n, const void *x, int64_t *at_T, float *found_T) {
  each_row(threads, num, 2 * n, [&](int64_t row) { at_T[row] = pieces().highest(is_brain, at(x, row, n, is_brain), n, found_T + row); });
}

namespace {

typedef std::pair<float, int64_t> Scored;

bool is_before(const Scored &a, const Scored &b) { return (a.first != a.first && b.first == b.first) || a.first > b.first; }

// The k best, as torch.topk has them, also where numbers are equal (aten/src/ATen/native/TopKImpl.h).
void best(std::vector<Scored> *scored, int64_t k) {
  const auto begin = scored->begin(), end = scored->end();
  if (k * 64 <= static_cast<int64_t>(scored->size())) {
    std::partial_sort(begin, begin + k, end, is_before);
    return;
  }
  std::nth_element(begin, begin + k - 1, end, is_before);
  std::sort(begin, begin + k - 1, is_before);
}

// Groups but the best, by the sum of their two best experts, get no expert.
void close_groups(const Route &r, float *choice) {
  const int64_t each = r.router.n / r.num_groups;
  std::vector<Scored> groups;
  for (int64_t g = 0; g < r.num_groups; g++) {
    std::vector<Scored> own;
    for (int64_t e = 0; e < each; e++) own.emplace_back(choice[g * each + e], e);
    best(&own, 2);
    groups.emplace_back(0.0f + own[0].first + own[1].first, g);
  }
  best(&groups, r.top_groups);
  std::vector<bool> is_open(r.num_groups);
  for (int64_t i = 0; i < r.top_groups; i++) is_open[groups[i].second] = true;
  for (int64_t e = 0; e < r.router.n; e++)
    if (!is_open[e / each]) choice[e] = -__builtin_inff();
}

}  // namespace

void choose(const Route &r, int64_t num, const Routed &routed) {
  const int64_t experts = r.router.n, k = r.top_k;
  const float least = r.scoring == kSigmoid ? 1e-20f : 0.0f;
  if (r.scoring == kSigmoid) pieces().sigmoid(routed.logits, num * experts, routed.scores);
  std::vector<float> choice(experts);
  std::vector<Scored> scored(experts);
  for (int64_t row = 0; row < num; row++) {
    if (r.scoring == kSoftmax) pieces().softmax(routed.logits + row * experts, experts, routed.scores + row * experts);
    const float *scores = routed.scores + row * experts;
    for (int64_t e = 0; e < experts; e++) choice[e] = r.choice_bias ? scores[e] + r.choice_bias[e] : scores[e];
    if (r.num_groups > 1) close_groups(r, choice.data());
    for (int64_t e = 0; e < experts; e++) scored[e] = {choice[e], e};
    best(&scored, k);
    float *weights = routed.weights + row * k;
    for (int64_t i = 0; i < k; i++) {
      routed.ids[row * k + i] = scored[i].second;
      weights[i] = scores[scored[i].second];
    }
    const float total = r.normalises ? pieces().total(weights, k) + least : 1.0f;
    for (int64_t i = 0; i < k; i++) weights[i] = weights[i] / total * static_cast<float>(r.scale);
  }
}

}  // namespace trinity
