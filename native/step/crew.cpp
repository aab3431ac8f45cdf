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

class Crew {
 public:
  explicit Crew(int num) {
    for (int i = 0; i < num; i++) threads_.emplace_back([this] { serve(); });
  }

  ~Crew() {
    {
      std::lock_guard<std::mutex> hold(lock_);
      ends_ = true;
      call_++;
    }
    wakes_.notify_all();
    for (std::thread &thread : threads_) thread.join();
  }

  int num() const { return static_cast<int>(threads_.size()); }

  void run(int64_t num, const std::function<void(int64_t, int64_t)> &work) {
    work_ = &work;
    num_ = num;
    size_ = std::max<int64_t>(1, num / (kChunks * (this->num() + 1)));
    next_ = 0;
    busy_ = this->num();
    {
      std::lock_guard<std::mutex> hold(lock_);
      call_++;
    }
    wakes_.notify_all();
    take();
    for (int turn = 0; busy_.load(std::memory_order_acquire) > 0; turn++) turn < kPatience ? pause() : std::this_thread::yield();
  }

 private:
  void take() {
    for (int64_t first; (first = next_.fetch_add(size_)) < num_;) (*work_)(first, std::min(num_, first + size_));
  }

  void serve() {
    for (uint64_t done = 0;;) {
      for (int turn = 0; turn < kPatience && call_.load(std::memory_order_acquire) == done; turn++) pause();
      if (call_.load(std::memory_order_acquire) == done) {
        std::unique_lock<std::mutex> hold(lock_);
        wakes_.wait(hold, [&] { return call_ != done; });
      }
      done++;
      if (ends_) return;
      take();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> threads_;
  std::mutex lock_;
  std::condition_variable wakes_;
  std::atomic<uint64_t> call_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
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
