// Waiting at a word that another process changes: a short spin where the peer runs on another core, then the kernel.
//
// Decisions: a wake of another core costs some 15 us, so a peer that is at work there is worth a short look; one that was last seen
// on this very core cannot run while we look. Nothing waits longer than a tick without a look at the clock and at the peer:
// a process that is killed wakes nobody, and a word may hold anything.
#pragma once
#include "layout.h"

namespace trinity {

double now_s();  // Python's time.monotonic()

// Mapped memory of a ring. Raises nothing: `ok()` says whether the descriptor is one.
class Mapping {
 public:
  explicit Mapping(int fd);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  bool ok() const { return control_ != nullptr; }
  Control& control() const { return *control_; }
  char* box(int slot) const { return reinterpret_cast<char*>(control_) + kControlBytes + slot * kBoxBytes; }

 private:
  Control* control_ = nullptr;
};

// Whether the process at the other end of a socket has closed it, or ended.
bool is_gone(int sock);

void ring_bell(Bell& bell);  // after `value` was changed: wakes who waits

// Waits while the word is `old`, for a tick at most; `peer_cpu`: where its other side was last seen.
void wait_a_tick(Bell& bell, uint32_t old, const std::atomic<int32_t>& peer_cpu, double tick_s);

int32_t this_cpu();

}  // namespace trinity
