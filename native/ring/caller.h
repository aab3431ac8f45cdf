// A caller's side: one layer's rows to the shards that hold their experts, and the sum of what comes back, each in one call.
//
// Legend: T tokens, D model, K top-k, E experts of the layer, N replicas at most, S shards, R rows of one shard.
// The bits are those of trinity/dispatch: a token's replica by the same hash, sums over shards in the table's order, rounded alike.
// Decisions: `begin` posts all or nothing; `finish` believes nothing in the ring but an answer's number and code; a slot whose answer
// nobody waits for any more is free again when the shard has answered. All requests are posted before any shard is woken, and
// the last is waited for first: then the others' answers are mostly there, and woke nobody. For one thread at a time.
#pragma once
#include <memory>
#include <vector>

#include "bell.h"
#include "way.h"

namespace trinity {

class Ring : public Way {
 public:
  Ring(int fd, int sock);  // fills in new memory; `sock`: of the same connection, looked at for its end
  bool ok() const override { return ring_.ok() && !is_closed_; }
  void close() override { is_closed_ = true; }
  int lend() override;
  void take_back(int slot) override { is_lent_[slot] = false; }
  char* box(int slot) const override { return ring_.box(slot); }
  void post(int slot, const Head& head, const Names& names) override;
  void wake() override { ring_bell(ring_.control().asked); }
  Code wait(int slot, double until_s) override;
  bool is_gone() const { return is_closed_ || trinity::is_gone(sock_); }

 private:
  Mapping ring_;
  Waiter waiter_;
  int sock_;
  bool is_closed_ = false;
  bool is_lent_[kNumSlots] = {};
  uint32_t asked_[kNumSlots] = {};
};

struct Plan {                       // of one layer, as a table and the connections are now
  std::vector<WayPtr> rings;        // [S]; null where there is none
  std::vector<int32_t> shard;       // [E, N]
  std::vector<int32_t> num_replicas;  // [E]
  bool is_replicated;
  int64_t epoch = 0;
  bool is_far = false;  // some way is
  int64_t num_experts() const { return static_cast<int64_t>(num_replicas.size()); }
  int64_t most_replicas() const { return static_cast<int64_t>(shard.size()) / num_experts(); }
};

struct Batch {
  int32_t layer;
  int64_t version, priority;
  double until_s;
  uint32_t format;
  const char* x;       // [T, D]
  const int64_t* ids;  // [T, K]; -1: nobody's
  const float* weights;  // [T, K]
  int64_t num_tokens, dim, top_k;
  const char* op_id = "";
};

struct Failure {
  Code code;
  int shard;  // which one; 0 where it is none's
};

class Pending {  // rows on their way
 public:
  explicit Pending(std::shared_ptr<const Plan> plan) : plan_(std::move(plan)) {}
  ~Pending() { abandon(); }
  Failure begin(const Batch& batch);
  Failure finish(char* y, double until_s);  // y [T, D]
  void abandon();

 private:
  struct Part {
    int shard, slot;
    std::vector<int32_t> tokens;  // of each row; empty: all
    int64_t num_rows;
  };
  Failure route(const Batch& batch);
  int32_t shard_of(const Batch& batch, int64_t token, int64_t id) const;
  Failure reserve();
  void post(const Batch& batch, const Part& part);
  const char* rows_of(const Part& part) const;
  Places places_of(const Part& part) const { return Places(part.num_rows, dim_, top_k_, format_); }
  void add_up(float* y) const;
  template <class F>
  void each_row(F add) const;

  std::shared_ptr<const Plan> plan_;
  std::vector<Part> parts_;
  std::vector<int32_t> shard_of_slot_;  // [T, K]
  int64_t num_tokens_ = 0, dim_ = 0, top_k_ = 0;
  uint32_t format_ = kRowsF32;
};

}  // namespace trinity
