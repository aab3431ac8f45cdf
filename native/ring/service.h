// A shard's side of a ring: a thread that takes requests out of it, has them computed, and answers, without entering Python.
#pragma once
#include <memory>
#include <thread>

#include "bell.h"
#include "lane.h"

namespace trinity {

struct Service {  // of one shard, for all of its connections
  Registry registry;
  Lane lane{registry};
};

class Attachment {
 public:
  // Null where the descriptor is no ring of this layout.
  static std::unique_ptr<Attachment> make(std::shared_ptr<Service> service, int fd);
  ~Attachment() { stop(); }
  void stop();  // waits for a request that is being computed; harmless when repeated

 private:
  Attachment(std::shared_ptr<Service> service, int fd) : service_(std::move(service)), ring_(fd) {}
  void serve();
  bool take_all();
  void take(int slot, uint32_t number);
  void answer(int slot, uint32_t number, Code code);

  std::shared_ptr<Service> service_;
  Mapping ring_;
  Waiter waiter_;
  std::atomic<bool> is_stopped_{false};
  uint32_t taken_[kNumSlots] = {};
  std::thread thread_;
};

}  // namespace trinity
