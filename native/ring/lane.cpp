#ifdef __linux__
#include "lane.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <utility>

#include "bell.h"
#include "bfloat16.h"

namespace trinity {

namespace {

bool is_shared(const Head& a, const Head& b) {
  return a.layer == b.layer && a.version == b.version && a.priority == b.priority && a.dim == b.dim;
}

}  // namespace

bool Lane::submit(Job& job) {
  std::lock_guard<std::mutex> lock(guard_);
  waiting_.push_back(&job);
  return !std::exchange(is_taken_, true);
}

void Lane::work() {
  do {
    for (std::vector<Job*> group; !(group = next()).empty();) compute(std::move(group));
  } while (!is_left());
}

bool Lane::is_left() {
  std::lock_guard<std::mutex> lock(guard_);
  if (waiting_.empty()) is_taken_ = false;
  return !is_taken_;
}

namespace {

struct Turn {  // of a thread that waits
  std::mutex guard;
  std::condition_variable told;
  bool is_done = false, leads = false;
  Code code = kDone;

  void tell(bool Turn::* what) {
    std::lock_guard<std::mutex> lock(guard);
    this->*what = true;
    told.notify_one();
  }
  bool wait() {
    std::unique_lock<std::mutex> lock(guard);
    told.wait(lock, [this] { return is_done || leads; });
    return leads;
  }
};

}  // namespace

Code Lane::run(Job& job) {
  Turn own;
  job.owner = &own;
  job.answer = [](Job& done, Code code) {
    Turn* turn = static_cast<Turn*>(done.owner);
    turn->code = code;
    turn->tell(&Turn::is_done);
  };
  job.lead = [](Job& next) { static_cast<Turn*>(next.owner)->tell(&Turn::leads); };
  if (submit(job) || own.wait()) {
    while (!own.is_done) compute(next());
    hand_over();
  }
  return own.code;
}

// To a thread whose job waits, if there is one.
void Lane::hand_over() {
  std::lock_guard<std::mutex> lock(guard_);
  if (waiting_.empty())
    is_taken_ = false;
  else
    waiting_.front()->lead(*waiting_.front());
}

std::vector<Job*> Lane::next() {
  std::lock_guard<std::mutex> lock(guard_);
  if (waiting_.empty()) return {};
  const Head first = (*std::min_element(waiting_.begin(), waiting_.end(), [](const Job* a, const Job* b) {
                       return a->head.priority < b->head.priority;
                     }))->head;
  auto others = std::stable_partition(waiting_.begin(), waiting_.end(), [&](Job* job) { return is_shared(job->head, first); });
  std::vector<Job*> group(waiting_.begin(), others);
  waiting_.erase(waiting_.begin(), others);
  return group;
}

void Lane::compute(std::vector<Job*> group) {
  const LayerPtr layer = registry_.pin(group[0]->head.layer, group[0]->head.version);
  row_.clear(), expert_.clear(), weight_.clear();
  std::vector<Job*> good;
  int64_t num_rows = 0;
  for (Job* job : group) {
    const Code code = layer ? assign(*job, *layer, num_rows) : kNotHere;
    if (code != kDone) {
      job->answer(*job, code);
      continue;
    }
    good.push_back(job);
    num_rows += job->head.num_rows;
  }
  if (!layer) return;
  sort(*layer);
  if (!good.empty()) multiply(good, *layer, num_rows);
  registry_.unpin(layer, counts_.data());
  for (Job* job : good) job->answer(*job, kDone);
}

// Takes in a job's slots as assignments of rows from `first_row` on; none of them unless the job is right.
Code Lane::assign(const Job& job, const Layer& layer, int64_t first_row) {
  if (static_cast<int64_t>(job.head.dim) != layer.dim || job.head.format != layer.format) return kBadFrame;
  if (job.head.num_slots > layer.position.size()) return kBadFrame;
  if (now_s() > job.until_s) return kLate;
  const size_t before = row_.size(), num = size_t{job.head.num_rows} * job.head.num_slots;
  Code code = kDone;
  for (size_t i = 0; i < num && code == kDone; ++i) {
    const int64_t id = job.ids[i];
    if (id == -1) continue;
    if (id < 0 || id >= static_cast<int64_t>(layer.position.size())) {
      code = kBadFrame;
    } else if (layer.position[id] == kNotHeld) {
      code = kNotHere;
    } else {
      row_.push_back(first_row + static_cast<int64_t>(i / job.head.num_slots));
      expert_.push_back(layer.position[id]);
      weight_.push_back(job.weights[i]);
    }
  }
  if (code != kDone) row_.resize(before), expert_.resize(before), weight_.resize(before);
  return code;
}

// Assignments by expert, those of one in the order of their rows.
void Lane::sort(const Layer& layer) {
  const size_t num_experts = layer.experts.size();
  counts_.assign(num_experts, 0);
  end_.assign(num_experts, 0);
  for (int32_t expert : expert_) ++counts_[expert];
  std::vector<int64_t> next(num_experts, 0);
  for (size_t e = 0, sum = 0; e < num_experts; ++e) next[e] = sum, end_[e] = sum += counts_[e];
  sorted_row_.resize(row_.size()), sorted_weight_.resize(row_.size());
  for (size_t a = 0; a < row_.size(); ++a) {
    const int64_t to = next[expert_[a]]++;
    sorted_row_[to] = row_[a], sorted_weight_[to] = weight_[a];
  }
}

void Lane::multiply(const std::vector<Job*>& group, const Layer& layer, int64_t num_rows) {
  const size_t dim = layer.dim, row_bytes = bytes_of(layer.format) * dim;
  if (!layer.kernel) {
    for (const Job* job : group) std::memcpy(job->y, job->x, job->head.num_rows * row_bytes);
    return;
  }
  const char* x = group[0]->x;
  if (group.size() > 1) {
    x_.resize(num_rows * row_bytes);
    char* to = x_.data();
    for (const Job* job : group) to = std::copy(job->x, job->x + job->head.num_rows * row_bytes, to);
    x = x_.data();
  }
  y_.resize(row_.size() * dim);
  ExpertCall call = {num_rows, static_cast<int64_t>(row_.size()), static_cast<int64_t>(layer.experts.size()), layer.dim, layer.hidden,
                     layer.format, x, sorted_row_.data(), end_.data(), sorted_weight_.data(), {}, y_.data()};
  std::copy(std::begin(layer.stacks), std::end(layer.stacks), call.stacks);
  if (call.num_assigned) layer.kernel(&call);
  layer.format == kRowsF32 ? add_up(group, dim) : add_up_rounded(group, dim, num_rows);
}

// A row's answer: zero, to which its experts' rows are added in their order.
void Lane::add_up(const std::vector<Job*>& group, size_t dim) {
  std::vector<float*> y_of_row;
  for (const Job* job : group)
    for (size_t r = 0; r < job->head.num_rows; ++r) y_of_row.push_back(reinterpret_cast<float*>(job->y) + r * dim);
  for (float* y : y_of_row) std::memset(y, 0, 4 * dim);
  for (size_t a = 0; a < row_.size(); ++a) {
    float* y = y_of_row[sorted_row_[a]];
    const float* part = y_.data() + a * dim;
    for (size_t d = 0; d < dim; ++d) y[d] += part[d];
  }
}

// The same in bfloat16: each expert's row is rounded, and so is the sum.
void Lane::add_up_rounded(const std::vector<Job*>& group, size_t dim, int64_t num_rows) {
  sum_.assign(num_rows * dim, 0.0f);
  for (size_t a = 0; a < row_.size(); ++a) {
    float* sum = sum_.data() + sorted_row_[a] * dim;
    const float* part = y_.data() + a * dim;
    for (size_t d = 0; d < dim; ++d) sum[d] += widened(rounded(part[d]));
  }
  const float* sum = sum_.data();
  for (const Job* job : group) {
    uint16_t* y = reinterpret_cast<uint16_t*>(job->y);
    for (size_t i = 0; i < job->head.num_rows * dim; ++i) y[i] = rounded(*sum++);
  }
}

}  // namespace trinity
#endif
