#ifdef __linux__
#include "caller.h"

#include <algorithm>
#include <cstring>

#include "bfloat16.h"

namespace trinity {

namespace {

constexpr double kTickS = 0.05;  // until a look at the clock, and whether the peer is there
constexpr int32_t kNobody = -1;

// trinity/dispatch/exchange.py:replica_hash
int64_t hash_of(const char* row, uint32_t format) {
  uint32_t bits = 0;  // of the first number, as float32
  std::memcpy(reinterpret_cast<char*>(&bits) + 4 - bytes_of(format), row, bytes_of(format));
  return static_cast<int64_t>((uint64_t{bits} * 0x9E3779B97F4A7C15u) >> 33);
}

}  // namespace

Ring::Ring(int fd, int sock) : ring_(fd), sock_(sock) {
  if (!ring_.ok()) return;
  Control& control = ring_.control();
  control.magic = kMagic, control.num_slots = kNumSlots, control.box_bytes = kBoxBytes;
  control.caller_cpu.store(-1), control.shard_cpu.store(-1);
}

int Ring::lend() {
  for (int slot = 0; slot < kNumSlots; ++slot)
    if (!is_lent_[slot] && ring_.control().slots[slot].answered.value.load() == asked_[slot]) {
      is_lent_[slot] = true;
      return slot;
    }
  return -1;
}

void Ring::post(int slot, const Head& head, const Names&) {
  Control& control = ring_.control();
  Head& shared = control.slots[slot].head;
  shared = head, shared.number = ++asked_[slot];
  control.slots[slot].asked.store(asked_[slot], std::memory_order_release);
  control.caller_cpu.store(this_cpu(), std::memory_order_relaxed);
  control.asked.value.fetch_add(1);
}

Code Ring::wait(int slot, double until_s) {
  Control& control = ring_.control();
  Bell& answered = control.slots[slot].answered;
  for (uint32_t seen; (seen = answered.value.load()) != asked_[slot];) {
    const double left_s = until_s - now_s();
    if (left_s <= 0) return kLate;
    waiter_.wait(answered, seen, control.shard_cpu, std::min(left_s, kTickS));
    if (answered.value.load() != asked_[slot] && is_gone()) return kGone;
  }
  const Answer answer = read_once(control.slots[slot].answer);
  return answer.number == asked_[slot] && answer.code <= kGone ? static_cast<Code>(answer.code) : kBadFrame;
}

Failure Pending::begin(const Batch& batch) {
  num_tokens_ = batch.num_tokens, dim_ = batch.dim, top_k_ = batch.top_k, format_ = batch.format;
  if (num_tokens_ <= 0 || dim_ <= 0 || top_k_ <= 0 || top_k_ > kMostSlotsOfRow || format_ > kRowsBf16) return {kBadFrame, 0};
  if (num_tokens_ > int64_t{kBoxBytes} || dim_ > int64_t{kBoxBytes}) return {kTooLarge, 0};
  Failure failure = route(batch);
  if (failure.code == kDone) failure = reserve();
  if (failure.code != kDone) return abandon(), failure;
  for (const Part& part : parts_) post(batch, part);
  for (const Part& part : parts_) plan_->rings[part.shard]->wake();
  return {kDone, 0};
}

Failure Pending::route(const Batch& batch) {
  const size_t num_shards = plan_->rings.size();
  for (int64_t i = 0; i < num_tokens_ * top_k_; ++i)
    if (batch.ids[i] < -1 || batch.ids[i] >= plan_->num_experts()) return {kBadFrame, 0};
  if (num_shards == 1) {
    parts_.push_back({0, -1, {}, num_tokens_});
    return {kDone, 0};
  }
  shard_of_slot_.resize(num_tokens_ * top_k_);
  std::vector<Part> all(num_shards);
  std::vector<int64_t> last(num_shards, -1);  // token that has a row there already
  for (int64_t t = 0; t < num_tokens_; ++t)
    for (int64_t i = t * top_k_; i < (t + 1) * top_k_; ++i) {
      const int32_t shard = shard_of_slot_[i] = shard_of(batch, t, batch.ids[i]);
      if (shard == kNobody || last[shard] == t) continue;
      last[shard] = t;
      all[shard].tokens.push_back(static_cast<int32_t>(t));
    }
  for (size_t shard = 0; shard < num_shards; ++shard) {
    Part& part = all[shard];
    if (part.tokens.empty()) continue;
    const int64_t num = static_cast<int64_t>(part.tokens.size());
    if (num == num_tokens_) part.tokens.clear();
    parts_.push_back({static_cast<int>(shard), -1, std::move(part.tokens), num});
  }
  return {kDone, 0};
}

int32_t Pending::shard_of(const Batch& batch, int64_t token, int64_t id) const {
  if (id < 0) return kNobody;
  const int64_t turn = plan_->is_replicated ? hash_of(batch.x + token * dim_ * bytes_of(format_), format_) % plan_->num_replicas[id] : 0;
  return plan_->shard[id * plan_->most_replicas() + turn];
}

// A ring, room and a slot for every part, or nothing.
Failure Pending::reserve() {
  for (const Part& part : parts_) {
    const WayPtr& ring = plan_->rings[part.shard];
    if (!ring) return {kNoRing, part.shard};
    if (!ring->ok()) return {kGone, part.shard};
    if (places_of(part).end > kBoxBytes) return {kTooLarge, part.shard};
  }
  for (Part& part : parts_)
    if ((part.slot = plan_->rings[part.shard]->lend()) < 0) return {kNoBox, part.shard};
  return {kDone, 0};
}

void Pending::post(const Batch& batch, const Part& part) {
  Way& ring = *plan_->rings[part.shard];
  const Places places = places_of(part);
  const size_t row_bytes = bytes_of(format_) * dim_;
  char* box = ring.box(part.slot);
  int64_t* ids = reinterpret_cast<int64_t*>(box);
  float* weights = reinterpret_cast<float*>(box + places.weights);
  char* rows = box + places.rows;
  for (int64_t r = 0; r < part.num_rows; ++r) {
    const int64_t t = part.tokens.empty() ? r : part.tokens[r];
    for (int64_t k = 0; k < top_k_; ++k) {
      const int64_t i = t * top_k_ + k;
      const bool is_theirs = shard_of_slot_.empty() || shard_of_slot_[i] == part.shard;
      ids[r * top_k_ + k] = is_theirs ? batch.ids[i] : kNobody;
      weights[r * top_k_ + k] = batch.weights[i];
    }
    if (!part.tokens.empty()) std::memcpy(rows + r * row_bytes, batch.x + t * row_bytes, row_bytes);
  }
  if (part.tokens.empty()) std::memcpy(rows, batch.x, num_tokens_ * row_bytes);
  Head head = {0, batch.version, batch.priority, batch.until_s - now_s(), batch.layer, static_cast<uint32_t>(part.num_rows),
               static_cast<uint32_t>(dim_), static_cast<uint32_t>(top_k_), format_, 0};
  ring.post(part.slot, head, {plan_->epoch, batch.op_id});
}

Failure Pending::finish(char* y, double until_s) {
  for (auto part = parts_.rbegin(); part != parts_.rend(); ++part) {
    const Failure failure = {plan_->rings[part->shard]->wait(part->slot, until_s), part->shard};
    if (failure.code != kDone) return abandon(), failure;
  }
  const size_t num = static_cast<size_t>(num_tokens_ * dim_);
  if (parts_.size() == 1 && parts_[0].tokens.empty()) {
    std::memcpy(y, rows_of(parts_[0]), bytes_of(format_) * num);
  } else if (format_ == kRowsF32) {
    add_up(reinterpret_cast<float*>(y));
  } else {
    std::vector<float> sum(num);
    add_up(sum.data());
    for (size_t i = 0; i < num; ++i) reinterpret_cast<uint16_t*>(y)[i] = rounded(sum[i]);
  }
  abandon();
  return {kDone, 0};
}

// Sums over shards in the order of the table.
void Pending::add_up(float* y) const {
  std::memset(y, 0, 4 * num_tokens_ * dim_);
  if (format_ == kRowsF32)
    each_row([&](int64_t token, const char* row) {
      const float* from = reinterpret_cast<const float*>(row);
      for (int64_t d = 0; d < dim_; ++d) y[token * dim_ + d] += from[d];
    });
  else
    each_row([&](int64_t token, const char* row) {
      const uint16_t* from = reinterpret_cast<const uint16_t*>(row);
      for (int64_t d = 0; d < dim_; ++d) y[token * dim_ + d] += widened(from[d]);
    });
}

template <class F>
void Pending::each_row(F add) const {
  for (const Part& part : parts_) {
    const char* rows = rows_of(part);
    for (int64_t r = 0; r < part.num_rows; ++r) add(part.tokens.empty() ? r : part.tokens[r], rows + r * dim_ * bytes_of(format_));
  }
}

const char* Pending::rows_of(const Part& part) const {
  return plan_->rings[part.shard]->box(part.slot) + places_of(part).answer;
}

void Pending::abandon() {
  for (const Part& part : parts_)
    if (part.slot >= 0) plan_->rings[part.shard]->take_back(part.slot);
  parts_.clear();
}

}  // namespace trinity
#endif
