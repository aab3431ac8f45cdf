#include "plan.h"

#include "parts.h"

namespace trinity {

namespace {

class Walk {
 public:
  explicit Walk(const Step &step) : step_(step), run_(*step.run) {}

  // What is at a place of a layer; false: Python has to.
  bool pass(int64_t layer, int64_t place) {
    const Layer &own = step_.layers[layer];
    switch (place) {
      case kEnter: return !own.is_whole && enter(own);
      case kAttend: return meet(layer);
      case kRoute: return turn(own, layer);
      case kChoose: return !own.route.router.values || own.route.has_sigmoid;
      case kExperts: return !own.route.router.values || ask(own, layer);
      case kLocal: return beside(own, layer);
      case kJoin: return !own.route.router.values || is_here(layer);
      default: return quit(own);
    }
  }

 private:
  bool is_here(int64_t layer) const { return step_.experts[layer].gate.values; }

  bool enter(const Layer &own) {
    project(own.project, threads(), run_.num, run_.h, run_.cos, run_.sin, run_.q, run_.k, run_.v, run_.gate);
    return true;
  }

  bool meet(int64_t layer) {
    if (!step_.memory || step_.memory[layer].attend < 0) return false;
    const Memory &memory = step_.memory[layer];
    attend(step_.attends[memory.attend], threads(), run_.q, run_.k, run_.v, memory.keys, memory.values, run_.mixed);
    return true;
  }

  bool turn(const Layer &own, int64_t layer) {
    const void *gate = own.project.gate.values ? run_.gate : nullptr;
    route(own.route, threads(), run_.num, run_.mixed, gate, run_.h, run_.residual, run_.x, routed(layer));
    return true;
  }

  // Memory of this layer's decision: behind that of the layers before it that make one.
  Routed routed(int64_t layer) const {
    int64_t before = 0;
    for (int64_t each = 0; each < layer; each++) before += step_.layers[each].route.router.values != nullptr;
    const Route &own = step_.layers[layer].route;
    const int64_t experts = before * run_.num * own.router.n, chosen = before * run_.num * own.top_k;
    const Routed &all = run_.routed;
    return {all.logits + experts, all.scores + experts, all.ids + chosen, all.weights + chosen};
  }

  bool ask(const Layer &own, int64_t layer) {
    const Experts &here = step_.experts[layer];
    if (!is_here(layer)) return false;
    int64_t *rows = reinterpret_cast<int64_t *>(scratch_of<7>(here.num * 8));
    const Routed found = routed(layer);
    return experts(here, threads(), run_.num, run_.x, found.ids, found.weights, run_.y, rows, own.local, run_.local);
  }

  bool beside(const Layer &own, int64_t layer) {
    const bool is_done = own.route.router.values && is_here(layer);  // with the experts
    if (own.local.gate.values && !is_done) feed_forward_all(own.local, threads(), run_.num, run_.x, run_.local);
    return true;
  }

  bool quit(const Layer &own) {
    const void *local = own.local.gate.values ? run_.local : nullptr;
    const bool routes = own.route.router.values;
    leave(own.leave, threads(), run_.num, run_.residual, routes ? run_.y : local, routes ? local : nullptr, run_.h);
    return true;
  }

  int threads() const { return static_cast<int>(run_.threads); }

  const Step &step_;
  const Run &run_;
};

}  // namespace

int64_t go(const Step &step, int64_t at) {
  Walk walk(step);
  for (; at < step.num_layers * kPlaces; at++)
    if (!walk.pass(at / kPlaces, at % kPlaces)) return at;
  const Run &run = *step.run;
  finish(*step.head, static_cast<int>(run.threads), run.num, run.h, run.hidden, run.logits);
  return at;
}

}  // namespace trinity
