#ifdef __linux__
#include "service.h"

#include <cmath>

namespace trinity {

namespace {

constexpr double kTickS = 1.0;  // an idle thread looks so often whether it is to stop

struct Asked {
  Attachment* attachment;
  int slot;
  uint32_t number;
};

bool is_sound(const Head& head) {
  if (head.num_rows == 0 || head.dim == 0 || head.num_slots == 0 || head.num_slots > kMostSlotsOfRow) return false;
  if (head.format > kRowsBf16 || head.num_rows > kBoxBytes || head.dim > kBoxBytes || !std::isfinite(head.left_s)) return false;
  return Places(head.num_rows, head.dim, head.num_slots, head.format).end <= kBoxBytes;
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

void Attachment::stop() {
  is_stopped_.store(true);
  if (!thread_.joinable()) return;
  ring_.control().asked.value.fetch_add(1);
  ring_bell(ring_.control().asked);
  thread_.join();
}

void Attachment::serve() {
  Control& control = ring_.control();
  while (!is_stopped_.load()) {
    const uint32_t seen = control.asked.value.load();
    if (!take_all()) waiter_.wait(control.asked, seen, control.caller_cpu, kTickS);
  }
}

bool Attachment::take_all() {
  bool any = false;
  for (int slot = 0; slot < kNumSlots && !is_stopped_.load(); ++slot) {
    const uint32_t number = ring_.control().slots[slot].asked.load(std::memory_order_acquire);
    if (number == taken_[slot]) continue;
    taken_[slot] = number;
    take(slot, number);
    any = true;
  }
  return any;
}

void Attachment::take(int slot, uint32_t number) {
  const Head head = read_once(ring_.control().slots[slot].head);
  if (!is_sound(head) || static_cast<uint32_t>(head.number) != number) return answer(slot, number, kBadFrame);
  const Places places(head.num_rows, head.dim, head.num_slots, head.format);
  char* box = ring_.box(slot);
  Asked asked = {this, slot, number};
  Job job = {head,
             now_s() + head.left_s,
             reinterpret_cast<const volatile int64_t*>(box),
             reinterpret_cast<const float*>(box + places.weights),
             box + places.rows,
             box + places.answer,
             [](Job& done, Code code) {
               const Asked* of = static_cast<Asked*>(done.owner);
               of->attachment->answer(of->slot, of->number, code);
             },
             &asked};
  service_->lane.run(job);
}

void Attachment::answer(int slot, uint32_t number, Code code) {
  Control& control = ring_.control();
  Slot& at = control.slots[slot];
  at.answer = {number, code};
  control.shard_cpu.store(this_cpu(), std::memory_order_relaxed);
  at.answered.value.store(number);
  ring_bell(at.answered);
}

}  // namespace trinity
#endif
