// Whose requests are computed now, where more callers than cores ask without a pause and their experts take next to no time.
//
// Decisions: a core that goes from one caller to the next at every call does little else than fill its caches: a call in Python takes four
// times as long after another process than after itself. So as many callers as there are cores have turns of two milliseconds, in the
// order in which they came, and the others' requests wait. Who asks nothing for a moment has had its turn; who is more
// urgent does not wait.
#pragma once
#include <deque>
#include <mutex>
#include <vector>

#include "lane.h"

namespace trinity {

constexpr double kTurnS = 2e-3, kQuietS = 500e-6;

class Turns {
 public:
  explicit Turns(size_t num) : seats_(num) {}
  // -> what is to be computed now that this job has come.
  std::vector<Job*> with(const void* who, Job* job, double now_s);
  std::vector<Job*> due(double now_s);  // of what waits
  std::vector<Job*> all();              // that waits; turns begin anew

 private:
  struct Seat {
    const void* who = nullptr;
    double since_s = 0, last_s = 0;
  };
  struct Held {
    const void* who;
    Job* job;
  };
  bool may_go(const void* who, const Job& job, double now_s);
  void seat_next(double now_s, std::vector<Job*>& due);

  std::mutex guard_;
  std::vector<Seat> seats_;
  std::deque<Held> held_;
  int64_t priority_ = 0;  // of the last that went
};

}  // namespace trinity
