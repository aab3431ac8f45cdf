#ifdef __linux__
#include "bell.h"

#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace trinity {

namespace {

constexpr int kSpins = 1000;      // some 20 us
constexpr double kShortS = 150e-6;  // of a wait: two wakes of other cores, and what is done between

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, const timespec* until) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, until, nullptr, 0);
}

}  // namespace

double now_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

Mapping::Mapping(int fd) {
  struct stat found;
  if (fstat(fd, &found) || static_cast<uint64_t>(found.st_size) != kRingBytes) return;
  void* memory = mmap(nullptr, kRingBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory != MAP_FAILED) control_ = static_cast<Control*>(memory);
}

Mapping::~Mapping() {
  if (control_) munmap(control_, kRingBytes);
}

bool is_gone(int sock) {
  pollfd asked = {sock, POLLRDHUP, 0};
  return poll(&asked, 1, 0) != 0;  // POLLHUP, POLLERR and POLLNVAL come unasked
}

void ring_bell(Bell& bell) {
  if (bell.waiting.load()) futex(bell.value, FUTEX_WAKE, 1, nullptr);
}

bool Waiter::comes_soon(const Bell& bell, uint32_t old, const std::atomic<int32_t>& peer_cpu, int spins) const {
  if (!was_short_ || peer_cpu.load(std::memory_order_relaxed) == this_cpu()) return false;
  for (int i = 0; i < spins * kSpins; ++i) {
    if (bell.value.load(std::memory_order_acquire) != old) return true;
    pause();
  }
  return false;
}

void Waiter::wait(Bell& bell, uint32_t old, const std::atomic<int32_t>& peer_cpu, double tick_s, int spins) {
  if (comes_soon(bell, old, peer_cpu, spins)) return;
  const double since_s = now_s();
  bell.waiting.store(1);
  if (bell.value.load() == old) {
    const timespec tick = {static_cast<time_t>(tick_s), static_cast<long>(1e9 * (tick_s - static_cast<double>(static_cast<time_t>(tick_s))))};
    futex(bell.value, FUTEX_WAIT, old, &tick);
  }
  bell.waiting.store(0, std::memory_order_relaxed);
  was_short_ = now_s() - since_s < kShortS;
}

int32_t this_cpu() { return sched_getcpu(); }

}  // namespace trinity
#endif
