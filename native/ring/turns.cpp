#ifdef __linux__
#include "turns.h"

#include <algorithm>

namespace trinity {

std::vector<Job*> Turns::with(const void* who, Job* job, double now_s) {
  std::lock_guard<std::mutex> lock(guard_);
  std::vector<Job*> due;
  if (may_go(who, *job, now_s))
    priority_ = job->head.priority, due.push_back(job);
  else
    held_.push_back({who, job});
  seat_next(now_s, due);
  return due;
}

std::vector<Job*> Turns::due(double now_s) {
  std::lock_guard<std::mutex> lock(guard_);
  std::vector<Job*> due;
  seat_next(now_s, due);
  return due;
}

std::vector<Job*> Turns::all() {
  std::lock_guard<std::mutex> lock(guard_);
  std::vector<Job*> all;
  for (const Held& each : held_) all.push_back(each.job);
  held_.clear();
  return all;
}

bool Turns::may_go(const void* who, const Job& job, double now_s) {
  for (Seat& seat : seats_) {
    if (seat.who != who) continue;
    seat.last_s = now_s;
    if (held_.empty() || now_s - seat.since_s < kTurnS) return true;
    seat.who = nullptr;
  }
  return job.head.priority < priority_;
}

void Turns::seat_next(double now_s, std::vector<Job*>& due) {
  for (Seat& seat : seats_) {
    if (held_.empty()) return;
    if (seat.who && now_s - seat.last_s < kQuietS) continue;
    seat = {held_.front().who, now_s, now_s};
    const auto others = std::stable_partition(held_.begin(), held_.end(), [&](const Held& each) { return each.who == seat.who; });
    for (auto each = held_.begin(); each != others; ++each) due.push_back(each->job);
    held_.erase(held_.begin(), others);
  }
}

}  // namespace trinity
#endif
