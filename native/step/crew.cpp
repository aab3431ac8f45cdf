#include "crew.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace trinity {

namespace {

constexpr int64_t kAlone = 1 << 20;  // operations that are done before another thread has woken up
constexpr int64_t kChunks = 4;       // for each thread
constexpr int kPatience = 2000;      // turns in which the next call often comes

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Helpers join a call while it is open; what none of them has begun is the caller's, who closes it and waits for those that joined.
class Crew {
 public:
  explicit Crew(int num) {
    for (int i = 0; i < num; i++) threads_.emplace_back([this] { serve(); });
  }

  ~Crew() {
    ends_ = true;
    wake();
    for (std::thread &thread : threads_) thread.join();
  }

  int num() const { return static_cast<int>(threads_.size()); }

  void run(int64_t num, const std::function<void(int64_t, int64_t)> &work) {
    work_ = &work;
    num_ = num;
    size_ = std::max<int64_t>(1, num / (kChunks * (this->num() + 1)));
    next_ = 0;
    joined_.fetch_or(kOpen, std::memory_order_release);
    wake();
    take();
    joined_.fetch_and(~kOpen, std::memory_order_relaxed);
    for (int turn = 0; joined_.load(std::memory_order_acquire); turn++) turn < kPatience ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr uint32_t kOpen = 1, kOne = 2;  // of `joined_`: a helper counts two

  void wake() {
    calls_++;
    if (!num_asleep_) return;
    { std::lock_guard<std::mutex> hold(lock_); }  // who was about to sleep sleeps now
    wakes_.notify_all();
  }

  void take() {
    for (int64_t first; (first = next_.fetch_add(size_)) < num_;) (*work_)(first, std::min(num_, first + size_));
  }

  bool join() {
    for (uint32_t seen = joined_.load(); seen & kOpen;)
      if (joined_.compare_exchange_weak(seen, seen + kOne, std::memory_order_acquire)) return true;
    return false;
  }

  void await(uint64_t seen) {
    for (int turn = 0; turn < kPatience; turn++, pause())
      if (calls_.load() != seen) return;
    std::unique_lock<std::mutex> hold(lock_);
    num_asleep_++;
    wakes_.wait(hold, [&] { return calls_.load() != seen; });
    num_asleep_--;
  }

  void serve() {
    for (uint64_t seen = 0;;) {
      await(seen);
      seen = calls_.load();
      if (ends_) return;
      if (!join()) continue;
      take();
      joined_.fetch_sub(kOne, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex lock_;
  std::condition_variable wakes_;
  std::atomic<uint64_t> calls_{0};
  std::atomic<int> num_asleep_{0};
  std::atomic<uint32_t> joined_{0};
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t, int64_t)> *work_ = nullptr;
  int64_t num_ = 0, size_ = 1;
  std::atomic<bool> ends_{false};
};

}  // namespace

void in_threads(int threads, int64_t num, int64_t operations, const std::function<void(int64_t, int64_t)> &work) {
  if (threads <= 1 || num <= 1 || operations < kAlone) {
    work(0, num);
    return;
  }
  static thread_local std::unique_ptr<Crew> crew;
  if (!crew || crew->num() != threads - 1) {
    crew.reset();
    crew = std::make_unique<Crew>(threads - 1);
  }
  crew->run(num, work);
}

}  // namespace trinity
