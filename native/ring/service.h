// A shard's side of rings: threads that take requests out of them, have them computed, and answer, without entering Python.
//
// Decisions: a thread for each ring, and one at a time that works for all: whoever finds the lane free computes and answers what waits
// in any ring, while the others sleep, unrung; where it finds nothing more, they are rung again. So a caller's call costs no wake
// where others call, too, and calls that come together are computed together.
#pragma once
#include <memory>
#include <thread>
#include <vector>

#include "bell.h"
#include "lane.h"

namespace trinity {

class Attachment;

class Service {  // of one shard, for all of its connections
 public:
  Registry registry;
  Lane lane{registry};

  void add(Attachment* ring);
  void remove(Attachment* ring);
  void work();  // by who has the lane; until there is nothing to do
  // Whether cores are left for the other callers of late, if there are any, when this thread spins.
  bool may_spin() const { return num_rings_ < num_cores_ || num_in_a_row_ > kAlone; }
  void note(const Attachment* ring);  // it had a request

 private:
  bool take_all();
  void hush();
  bool is_rest();

  std::mutex guard_;
  static constexpr long kAlone = 16;
  std::vector<Attachment*> rings_;
  std::atomic<long> num_rings_{0}, num_in_a_row_{0};
  std::atomic<const Attachment*> last_{nullptr};
  const long num_cores_ = std::thread::hardware_concurrency();
};

class Attachment {
 public:
  // Null where the descriptor is no ring of this layout.
  static std::unique_ptr<Attachment> make(std::shared_ptr<Service> service, int fd);
  ~Attachment() { stop(); }
  void stop();  // waits for requests that are being computed; harmless when repeated

  // By whoever has the lane:
  bool take_all(bool& leads);  // whether there was anything; `leads`: the lane was free, and is this thread's now
  void hush() { ring_.control().asked.waiting.store(0); }
  void rouse() {
    if (is_asleep_.load()) ring_.control().asked.waiting.store(1);
  }

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
  bool take(int slot, uint32_t number);
  void answer(int slot, uint32_t number, Code code);

  std::shared_ptr<Service> service_;
  Mapping ring_;
  Waiter waiter_;
  std::mutex taking_;
  std::atomic<bool> is_stopped_{false}, is_asleep_{false}, leads_{false};
  std::atomic<int> num_away_{0};
  uint32_t taken_[kNumSlots] = {};
  Asked asked_[kNumSlots];
  std::atomic<bool> is_away_[kNumSlots] = {};  // a caller that asks again before it is answered waits for that
  std::thread thread_;
};

}  // namespace trinity
