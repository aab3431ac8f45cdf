// A whole step of small random models under sanitizers: matrices end where their memory does; any number of threads, all sets of
// instructions, and a step that stops and goes on give the same bits.
#include <stdio.h>

#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "step/parts.h"
#include "step/plan.h"

using namespace trinity;

namespace {

uint64_t state;

uint64_t next() { return state ^= state << 13, state ^= state >> 7, state ^= state << 17; }
int64_t below(int64_t n) { return static_cast<int64_t>(next() >> 20) % n; }
float number() { return static_cast<float>(static_cast<int64_t>(next() >> 40) - (1 << 23)) / (1 << 23); }

struct Model {  // memory of exactly its size each, so that whoever reads beyond is found
  bool is_brain;
  int64_t num, dim, heads, groups, head_dim, experts, top_k, hidden;
  std::deque<std::unique_ptr<char[]>> kept;
  std::vector<StepLayer> layers;
  std::vector<Experts> here;
  std::vector<Memory> memory;
  std::vector<Attend> seen;  // of the layers
  bool is_int8;
  Ending end;
  Run run;

  void *bytes(int64_t n) {
    kept.emplace_back(new char[static_cast<size_t>(n)]());
    return kept.back().get();
  }

  void *rows(int64_t n, float scale = 1, float shift = 0) {  // of random numbers
    char *memory = static_cast<char *>(bytes(n * size_of_one(is_brain)));
    for (int64_t i = 0; i < n; i++) {
      const float one = shift + scale * number();
      uint32_t bits;
      memcpy(&bits, &one, 4);
      const uint16_t high = static_cast<uint16_t>(bits >> 16);
      is_brain ? memcpy(memory + 2 * i, &high, 2) : memcpy(memory + 4 * i, &one, 4);
    }
    return memory;
  }

  Norm norm(int64_t n, bool first) { return {rows(n, 0.3f, 1), 1e-5, first}; }
  Matrix matrix(int64_t n, int64_t k, bool has_bias = false, int64_t stack = 1) {
    return {rows(stack * n * k, 0.5f), has_bias ? rows(n) : nullptr, nullptr, nullptr, n, k, is_brain ? kBfloat16 : kFloat32};
  }

  int64_t *whole(const std::vector<int64_t> &values) {
    int64_t *memory = static_cast<int64_t *>(bytes(8 * static_cast<int64_t>(values.size())));
    std::copy(values.begin(), values.end(), memory);
    return memory;
  }

  Model() {
    is_brain = below(2), num = 1 + below(9), dim = 3 + below(60), groups = 1 + below(3), heads = groups * (1 + below(5));
    head_dim = 2 * (1 + below(20)), experts = 4 + 2 * below(20), top_k = 1 + below(4), hidden = 1 + below(40);
    look();
    for (int64_t number = 0; number < 3; number++) add(number);
    end = {is_brain, dim, norm(dim, false), matrix(1 + below(90), dim)};
    const int64_t wide = heads * head_dim, narrow = groups * head_dim, routed = 2 * num;
    run = {num, 1, rows(num * head_dim), rows(num * head_dim), rows(num * dim), rows(num * dim), rows(num * dim), rows(num * wide),
           rows(num * narrow), rows(num * narrow), rows(num * wide), rows(num * wide), rows(num * dim), rows(num * dim),
           rows(num * dim), rows(num * end.head.n),
           {static_cast<float *>(bytes(4 * routed * experts)), static_cast<float *>(bytes(4 * routed * experts)),
            static_cast<int64_t *>(bytes(8 * routed * top_k)), static_cast<float *>(bytes(4 * routed * top_k))},
           rows_of, positions, nullptr};
  }

  void add(int64_t number) {  // the first is dense; the others' routers are of both kinds
    const int64_t wide = heads * head_dim, narrow = groups * head_dim;
    const bool first = below(2), is_gated = below(2), has_norm = below(2);
    const Norm none = {nullptr, 0, 0}, per_head = has_norm ? norm(head_dim, first) : none;
    const Matrix nothing = {};
    StepLayer layer = {};
    layer.project = {is_brain, dim, head_dim, below(2) ? head_dim : 0, norm(dim, first), per_head, per_head, matrix(wide, dim, below(2)),
                     matrix(narrow, dim, below(2)), matrix(narrow, dim), is_gated ? matrix(wide, dim) : nothing};
    layer.route = {is_brain, dim, wide, below(2) ? norm(dim, first) : none, norm(dim, first), matrix(dim, wide, below(2)),
                   number ? matrix(experts, dim) : nothing, number ? number : kPythons, top_k, number == 1 && below(2) ? 2 : 1, 1, 1,
                   nullptr, 2.5};
    if (layer.route.num_groups > 1) layer.route.top_groups = 1 + below(2);
    layer.route.top_k = top_k = std::min(top_k, experts / 2);
    layer.leave = {is_brain, dim, below(2) ? norm(dim, first) : none};
    if (!number || below(2)) layer.local = {is_brain, dim, matrix(hidden, dim), matrix(hidden, dim), matrix(dim, hidden)};
    layer.number = number;
    layers.push_back(layer);
    here.push_back(number ? all_experts() : Experts{});
    remember(number, narrow);
  }

  Experts all_experts() {
    std::vector<int64_t> ids, position;
    for (int64_t e = 0; e < experts; e++) ids.push_back(e), position.push_back(e);
    position.push_back(-1);
    return {is_brain, dim, experts, top_k, matrix(hidden, dim, false, experts), matrix(hidden, dim, false, experts),
            matrix(dim, hidden, false, experts), whole(position), experts, whole(ids), whole(std::vector<int64_t>(experts))};
  }

  const int64_t *rows_of, *positions;
  int64_t block_size, columns;
  const int32_t *blocks;

  void look() {  // each token is the last of a sequence of its own, whose blocks lie anywhere
    std::vector<int64_t> row, position;
    block_size = 1 + below(20), columns = 140 / block_size + 1;
    int32_t *table = static_cast<int32_t *>(bytes(4 * num * columns));
    for (int64_t i = 0; i < num * columns; i++) table[i] = static_cast<int32_t>(i);
    for (int64_t i = num * columns - 1; i > 0; i--) std::swap(table[i], table[below(i + 1)]);
    for (int64_t t = 0; t < num; t++) row.push_back(num - 1 - t), position.push_back(below(140));
    rows_of = whole(row), positions = whole(position), blocks = table, is_int8 = below(2);
  }

  void remember(int64_t number, int64_t narrow) {
    const int64_t slots = num * columns * block_size;
    const auto kept = [&] { return is_int8 ? bytes(slots * narrow) : rows(slots * narrow); };
    const auto scales = [&] { return is_int8 ? static_cast<float *>(bytes(4 * slots * groups)) : nullptr; };
    seen.push_back({is_brain, is_int8 ? kInt8 : is_brain ? kBfloat16 : kFloat32, heads, groups, head_dim, below(2) ? 1 + below(100) : 0,
                    block_size, columns, blocks});
    memory.push_back({number, {kept(), kept(), scales(), scales()}});
  }

  Step step() { return {layers.data(), static_cast<int64_t>(layers.size()), &end, here.data(), seen.data(), memory.data(), &run, {}}; }

  std::vector<char> result() const {
    const int64_t one = size_of_one(is_brain);
    std::vector<char> found;
    const auto take = [&](const void *from, int64_t n) { found.insert(found.end(), static_cast<const char *>(from), static_cast<const char *>(from) + n); };
    take(run.hidden, num * dim * one);
    take(run.logits, num * end.head.n * one);
    take(run.routed.scores, 8 * num * experts);
    take(run.routed.ids, 16 * num * top_k);
    take(run.routed.weights, 8 * num * top_k);
    return found;
  }
};

std::vector<char> computed(uint64_t seed, int threads, Isa wanted, bool stops) {
  use(wanted);
  chosen_pieces() = &pieces_of(std::min(wanted, isa()));
  state = seed;
  Model model;
  model.run.threads = threads;
  std::vector<Experts> elsewhere(model.layers.size());
  Step step = model.step();
  if (stops) step.experts = elsewhere.data();
  int64_t at = 0;
  while ((at = go(step, at).at) < step.num_layers * kPlaces) {
    if (!stops || (at % kPlaces != kExperts && at % kPlaces != kJoin)) return {};
    if (at % kPlaces == kJoin) {  // of the layers that route all but the first: their decisions lie one behind the other
      const int64_t layer = at / kPlaces, before = (layer - 1) * model.num * model.top_k;
      std::vector<int64_t> rows(static_cast<size_t>(model.experts));
      experts(model.here[layer], threads, model.num, model.run.x, model.run.routed.ids + before, model.run.routed.weights + before,
              model.run.y, rows.data(), Local{}, nullptr);
    }
    at++;
  }
  return model.result();
}

}  // namespace

int main() {
  const Isa best = isa();
  for (uint64_t seed = 1; seed <= 60; seed++) {
    const uint64_t start = seed * 0x9E3779B97F4A7C15ull;
    const std::vector<char> want = computed(start, 1, Isa::generic, false);
    for (Isa wanted : {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
      for (int threads : {1, 2, 3})
        for (bool stops : {false, true}) {
          if (wanted > best) continue;
          const std::vector<char> got = computed(start, threads, wanted, stops);
          if (got.empty() || got != want) {
            fprintf(stderr, "model %d: other bits with instructions %d, %d threads, stopping %d\n", static_cast<int>(seed),
                    static_cast<int>(wanted), threads, stops);
            return 1;
          }
        }
  }
  puts("step: the same bits with all instructions and threads, in one go or several");
}
