// The shard's inference, one multiplication at a time: whoever gets the lane computes for all that wait.
//
// Decisions: who leaves it hands it to whom it may concern, so that nobody waits for it who could do something else; the lowest
// priority first; calls of one layer and version are computed as one, their rows one after the other, which
// reads the weights once and gives each row the bits that it has alone. What is not right with one caller's call is that
// caller's. Nothing here enters Python.
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#include "layout.h"
#include "registry.h"

namespace trinity {

// A request whose head has been read and checked; box and answer belong to a peer that may write to them at any time.
struct Job {
  Head head;
  double until_s;
  const volatile int64_t* ids;  // [R, K]
  const float* weights;         // [R, K]
  const char* x;                // [R, D]
  char* y;                      // [R, D]
  void (*answer)(Job&, Code);   // by whoever computed it; the job may be another one afterwards
  void (*lead)(Job&);           // tells its thread that it has the lane
  void* owner;
};

class Lane {
 public:
  explicit Lane(Registry& registry) : registry_(registry) {}
  // Whether the lane was free, and is the caller's, who is to `work`; else whoever has it computes the job, too.
  bool submit(Job& job);
  void work();        // by who has it: all that waits
  Code run(Job& job);  // waits for it; its callbacks are set here

 private:
  bool is_left();
  void hand_over();
  std::vector<Job*> next();
  void compute(std::vector<Job*> group);
  Code assign(const Job& job, const Layer& layer, int64_t first_row);
  void sort(const Layer& layer);
  void multiply(const std::vector<Job*>& group, const Layer& layer, int64_t num_rows);
  void add_up(const std::vector<Job*>& group, size_t dim);
  void add_up_rounded(const std::vector<Job*>& group, size_t dim, int64_t num_rows);

  Registry& registry_;
  std::mutex guard_;
  std::vector<Job*> waiting_;
  bool is_taken_ = false;
  // Used by whoever has the lane.
  std::vector<int64_t> row_, end_, sorted_row_, counts_;
  std::vector<int32_t> expert_;
  std::vector<float> weight_, sorted_weight_, y_, sum_;
  std::vector<char> x_;
};

}  // namespace trinity
