#ifdef __linux__
#include "served.h"

#include <poll.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace trinity {

Served::Served(std::shared_ptr<Service> service, int fd, const char* magic)
    : service_(std::move(service)), socket_(fd) {
  std::memcpy(magic_, magic, sizeof magic_);
}

Served::Next Served::next() {
  for (;;) {
    iovec first = {&head, sizeof head};
    if (!socket_.receive(&first, 1, INFINITY)) return kEnded;
    if (std::memcmp(head.magic, magic_, sizeof magic_) || !is_plain(head) || !boxes_.ok()) return kHead;
    const Places at(head.num_rows, head.dim, head.num_slots, head.dtype);
    const size_t num_rows = head.num_rows, num_slots = num_rows * head.num_slots;
    payload_[0] = {boxes_.box(0) + at.rows, bytes_of(head.dtype) * num_rows * head.dim};
    payload_[1] = {boxes_.box(0), 8 * num_slots};
    payload_[2] = {boxes_.box(0) + at.weights, 4 * num_slots};
    iovec pieces[] = {payload_[0], payload_[1], payload_[2]};
    const double came_s = now_s();
    if (!socket_.receive(pieces, 3, came_s + std::max(double{head.left_s}, kPayloadS))) return kEnded;
    if (computed(came_s) != kDone) return kWhole;
    if (!answered()) return kEnded;
  }
}

Code Served::computed(double came_s) {
  const Places at(head.num_rows, head.dim, head.num_slots, head.dtype);
  Head asked = {0, head.version, head.priority, head.left_s, static_cast<int32_t>(head.layer), head.num_rows, head.dim, head.num_slots, head.dtype, 0};
  Code code = kDone;
  Job job = {asked,
             came_s + head.left_s,
             reinterpret_cast<const volatile int64_t*>(boxes_.box(0)),
             reinterpret_cast<const float*>(boxes_.box(0) + at.weights),
             boxes_.box(0) + at.rows,
             boxes_.box(0) + at.answer,
             [](Job& done, Code found) { *static_cast<Code*>(done.owner) = found; },
             &code};
  service_->lane.run(job);
  return code;
}

bool Served::answered() {
  const Places at(head.num_rows, head.dim, head.num_slots, head.dtype);
  FrameHead frame = {};
  std::memcpy(frame.magic, magic_, sizeof magic_);
  frame.kind = kAnswer, frame.dtype = head.dtype, frame.request = head.request, frame.num_rows = head.num_rows, frame.dim = head.dim;
  iovec all[] = {{&frame, sizeof frame}, {boxes_.box(0) + at.answer, bytes_of(head.dtype) * head.num_rows * head.dim}};
  iovec* pieces = all;
  const double until_s = now_s() + std::max(double{head.left_s}, kPayloadS);
  for (int num = 2;;) {
    short ready = 0;
    if (!socket_.send_some(pieces, num)) return false;
    if (!num) return true;
    if (!socket_.wait(POLLOUT, until_s, ready)) return false;
  }
}

}  // namespace trinity
#endif
