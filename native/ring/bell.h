// Waiting at a word that another process changes: a short spin where that is worth it, then the kernel.
//
// Decisions: a wake of another core costs some 15 us, so a change that is about to come from there is worth a short look; a peer that
// was last seen on this very core cannot run while we look. Whether one is about to come is told by the time before: who waits
// for experts that compute, or for a caller that does something else, would only take the core from those that it waits for. Nothing waits longer than a tick without a look at the clock and at the peer:
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

// One side's waits at a ring.
class Waiter {
 public:
  // Waits while the word is `old`, for a tick at most; `peer_cpu`: where its other side was last seen. `spins`: times a spin.
  void wait(Bell& bell, uint32_t old, const std::atomic<int32_t>& peer_cpu, double tick_s, int spins);

 private:
  bool comes_soon(const Bell& bell, uint32_t old, const std::atomic<int32_t>& peer_cpu, int spins) const;

  bool was_short_ = true;  // the wait before
};

int32_t this_cpu();

}  // namespace trinity
