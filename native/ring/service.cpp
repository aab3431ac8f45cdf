#ifdef __linux__
#include "service.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>

namespace trinity {

namespace {

constexpr double kTickS = 1.0, kEndTickS = 0.001;  // an idle thread looks so often whether it is to stop; one that stops, for answers
constexpr uint64_t kSliceNs = 100'000;

bool is_sound(const Head& head) {
  if (head.num_rows == 0 || head.dim == 0 || head.num_slots == 0 || head.num_slots > kMostSlotsOfRow) return false;
  if (head.format > kRowsBf16 || head.num_rows > kBoxBytes || head.dim > kBoxBytes || !std::isfinite(head.left_s)) return false;
  return Places(head.num_rows, head.dim, head.num_slots, head.format).end <= kBoxBytes;
}

struct Attributes {  // struct sched_attr of Linux, as it was at first
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};

// Who wants the core for little is given it when it wakes, not when the others' slices are over (Linux 6.12; refused before). Its share
// of the core stays what it was.
void ask_for_short_slices() {
  Attributes own = {};
  if (syscall(SYS_sched_getattr, 0, &own, sizeof own, 0)) return;
  own.size = sizeof own, own.runtime = kSliceNs;
  syscall(SYS_sched_setattr, 0, &own, 0);
}

}  // namespace

std::unique_ptr<Attachment> Attachment::make(std::shared_ptr<Service> service, int fd) {
  std::unique_ptr<Attachment> made(new Attachment(std::move(service), fd));
  if (!made->ring_.ok()) return nullptr;
  const Control& control = made->ring_.control();
  if (control.magic != kMagic || control.num_slots != kNumSlots || control.box_bytes != kBoxBytes) return nullptr;
  made->thread_ = std::thread(&Attachment::serve, made.get());
  return made;
}

void Service::note(const Attachment* ring) {
  num_in_a_row_ = last_.exchange(ring) == ring ? num_in_a_row_ + 1 : 0;
}

void Attachment::stop() {
  is_stopped_.store(true);
  if (!thread_.joinable()) return;
  nudge();
  thread_.join();
}

// Whoever waits at the ring's bell looks up.
void Attachment::nudge() {
  Bell& bell = ring_.control().asked;
  bell.value.fetch_add(1);
  bell.waiting.store(1);
  ring_bell(bell);
}

void Attachment::serve() {
  ask_for_short_slices();
  ++service_->num_rings;
  while (!is_stopped_.load() || num_away_.load() > 0) {
    const uint32_t seen = ring_.control().asked.value.load();
    const bool was_free = take_all();
    if (leads_.exchange(false) || was_free)
      service_->lane.work();
    else
      wait(seen);
  }
  --service_->num_rings;
}

void Attachment::wait(uint32_t seen) {
  Control& control = ring_.control();
  const bool may_spin = service_->may_spin() && !control.is_crowded.load(std::memory_order_relaxed);
  waiter_.wait(control.asked, seen, control.caller_cpu, is_stopped_.load() ? kEndTickS : kTickS, may_spin);
}

bool Attachment::take_all() {
  bool leads = false;
  for (int slot = 0; slot < kNumSlots && !is_stopped_.load(); ++slot) {
    const uint32_t number = ring_.control().slots[slot].asked.load(std::memory_order_acquire);
    if (number == taken_[slot] || is_away_[slot].load()) continue;
    taken_[slot] = number;
    service_->note(this);
    leads |= take(slot, number);
  }
  return leads;
}

bool Attachment::take(int slot, uint32_t number) {
  num_away_.fetch_add(1);
  is_away_[slot].store(true);
  const Head head = read_once(ring_.control().slots[slot].head);
  if (!is_sound(head) || static_cast<uint32_t>(head.number) != number) return answer(slot, number, kBadFrame), false;
  const Places places(head.num_rows, head.dim, head.num_slots, head.format);
  char* box = ring_.box(slot);
  Asked& asked = asked_[slot];
  asked = {this, slot, number, {head,
                                now_s() + head.left_s,
                                reinterpret_cast<const volatile int64_t*>(box),
                                reinterpret_cast<const float*>(box + places.weights),
                                box + places.rows,
                                box + places.answer,
                                [](Job& done, Code code) {
                                  const Asked* of = static_cast<Asked*>(done.owner);
                                  of->ring->answer(of->slot, of->number, code);
                                },
                                [](Job& next) {
                                  Attachment* ring = static_cast<Asked*>(next.owner)->ring;
                                  ring->leads_.store(true);
                                  ring->nudge();
                                },
                                &asked}};
  return service_->lane.submit(asked.job);
}

// By whoever computed it; nothing of this ring is touched afterwards.
void Attachment::answer(int slot, uint32_t number, Code code) {
  Control& control = ring_.control();
  Slot& at = control.slots[slot];
  is_away_[slot].store(false);  // before the answer, after which the next request may come
  at.answer = {number, code};
  control.shard_cpu.store(this_cpu(), std::memory_order_relaxed);
  control.is_shared.store(!service_->may_spin(), std::memory_order_relaxed);
  at.answered.value.store(number);
  ring_bell(at.answered);
  num_away_.fetch_sub(1);
}

}  // namespace trinity
#endif
