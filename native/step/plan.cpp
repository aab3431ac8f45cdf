#include "plan.h"

#include <string>

#include "parts.h"
#ifdef __linux__
#include "../ring/caller.h"
#endif

namespace trinity {

namespace {

class Walk {
 public:
  explicit Walk(const Step &step) : step_(step), run_(*step.run) {}

  int64_t failure() const { return failure_; }

  // What is at a place of a layer; false: Python has to.
  bool pass(int64_t layer, int64_t place) {
    const StepLayer &own = step_.layers[layer];
    switch (place) {
      case kEnter: return !own.is_whole && enter(own);
      case kAttend: return meet(layer);
      case kRoute: return turn(own, layer);
      case kChoose: return !own.route.router.values || own.route.scoring != kPythons;
      case kExperts: return !own.route.router.values || ask(own, layer);
      case kLocal: return beside(own, layer);
      case kJoin: return !own.route.router.values || is_here(layer) || join(layer);
      default: return quit(own);
    }
  }

 private:
  bool is_here(int64_t layer) const { return step_.experts[layer].gate.values; }

  bool enter(const StepLayer &own) {
    project(own.project, threads(), run_.num, run_.h, run_.cos, run_.sin, run_.q, run_.k, run_.v, run_.gate);
    return true;
  }

  bool meet(int64_t layer) {
    if (!step_.memory) return false;
    const Memory &memory = step_.memory[layer];
    const Tokens tokens = {run_.num, run_.row, run_.position};
    attend(step_.attends[memory.attend], threads(), tokens, run_.q, run_.k, run_.v, memory.kept, run_.mixed);
    return true;
  }

  bool turn(const StepLayer &own, int64_t layer) {
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

  bool ask(const StepLayer &own, int64_t layer) {
    const Experts &here = step_.experts[layer];
    if (!is_here(layer)) return send(layer);
    int64_t *rows = reinterpret_cast<int64_t *>(scratch_of<7>(here.num * 8));
    const Routed found = routed(layer);
    return experts(here, threads(), run_.num, run_.x, found.ids, found.weights, run_.y, rows, own.local, run_.local);
  }

#ifdef __linux__
  bool send(int64_t layer) {
    const Near &near = step_.near;
    if (near.plans.empty() || !near.plans[layer]) return false;
    const Route &own = step_.layers[layer].route;
    const Routed found = routed(layer);
    const std::string name = near.name + ":" + std::to_string(near.first_op + layer);
    sent_s_ = now_s();
    pending_ = std::make_unique<Pending>(near.plans[layer]);
    const Failure failure = pending_->begin({static_cast<int32_t>(step_.layers[layer].number), near.version, near.priority,
                                             sent_s_ + near.left_s, own.is_brain ? kRowsBf16 : kRowsF32,
                                             static_cast<const char *>(run_.x), found.ids, found.weights, run_.num, own.dim,
                                             own.top_k, name.c_str()});
    if (failure.code != kDone) pending_.reset();
    return is_done(failure);
  }

  bool join(int64_t layer) {
    if (!pending_) return false;
    const Failure failure = pending_->finish(static_cast<char *>(run_.y), sent_s_ + step_.near.left_s);
    pending_.reset();
    run_.waited_s[layer] = now_s() - sent_s_;
    return is_done(failure);
  }

  bool is_done(const Failure &failure) {
    failure_ = static_cast<int64_t>(failure.code) | static_cast<int64_t>(failure.shard) << 8;
    return failure.code == kDone;
  }
#else
  bool send(int64_t) { return false; }
  bool join(int64_t) { return false; }
#endif

  bool beside(const StepLayer &own, int64_t layer) {
    const bool is_done = own.route.router.values && is_here(layer);  // with the experts
    if (own.local.gate.values && !is_done) feed_forward_all(own.local, threads(), run_.num, run_.x, run_.local);
    return true;
  }

  bool quit(const StepLayer &own) {
    const void *local = own.local.gate.values ? run_.local : nullptr;
    const bool routes = own.route.router.values;
    leave(own.leave, threads(), run_.num, run_.residual, routes ? run_.y : local, routes ? local : nullptr, run_.h);
    return true;
  }

  int threads() const { return static_cast<int>(run_.threads); }

  const Step &step_;
  const Run &run_;
#ifdef __linux__
  std::unique_ptr<Pending> pending_;  // rows on their way by rings
  double sent_s_ = 0;
#endif
  int64_t failure_ = 0;
};

}  // namespace

Stop go(const Step &step, int64_t at) {
  Walk walk(step);
  for (; at < step.num_layers * kPlaces; at++)
    if (!walk.pass(at / kPlaces, at % kPlaces)) return {at, walk.failure()};
  const Run &run = *step.run;
  finish(*step.head, static_cast<int>(run.threads), run.num, run.h, run.hidden, run.logits);
  return {at, 0};
}

}  // namespace trinity
