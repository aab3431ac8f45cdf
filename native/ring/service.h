// A shard's side of rings: threads that take requests out of them, have them computed, and answer, without entering Python.
//
// Decisions: a thread for each ring, woken on the core where its caller has just written the rows, and there at once: it asks for short slices
// of time. Who finds the lane taken leaves its request with whoever has it, and waits for the next; nobody is woken to hand over.
#pragma once
#include <memory>
#include <thread>

#include "bell.h"
#include "lane.h"

namespace trinity {

class Attachment;

class Service {  // of one shard, for all of its connections
 public:
  Registry registry;
  Lane lane{registry};

  // Whether cores are left for the other callers of late, if there are any, when one of their threads spins.
  bool may_spin() const { return num_rings < num_cores_ || num_in_a_row_ > kAlone; }
  void note(const Attachment* ring);  // it had a request
  std::atomic<long> num_rings{0};

 private:
  static constexpr long kAlone = 16;
  std::atomic<long> num_in_a_row_{0};
  std::atomic<const Attachment*> last_{nullptr};
  const long num_cores_ = std::thread::hardware_concurrency();
};

class Attachment {
 public:
  // Null where the descriptor is no ring of this layout.
  static std::unique_ptr<Attachment> make(std::shared_ptr<Service> service, int fd);
  ~Attachment() { stop(); }
  void stop();  // waits for requests that are being computed; harmless when repeated

 private:
  struct Asked {
    Attachment* ring;
    int slot;
    uint32_t number;
    Job job;
  };
  Attachment(std::shared_ptr<Service> service, int fd) : service_(std::move(service)), ring_(fd) {}
  void serve();
  void wait(uint32_t seen);
  void nudge();
  bool take_all();  // whether the lane was free, and is this thread's now
  bool take(int slot, uint32_t number);
  void answer(int slot, uint32_t number, Code code);

  std::shared_ptr<Service> service_;
  Mapping ring_;
  Waiter waiter_;
  std::atomic<bool> is_stopped_{false}, leads_{false};
  std::atomic<int> num_away_{0};
  uint32_t taken_[kNumSlots] = {};
  Asked asked_[kNumSlots];
  std::atomic<bool> is_away_[kNumSlots] = {};  // a caller that asks again before it is answered waits for that
  std::thread thread_;
};

}  // namespace trinity
