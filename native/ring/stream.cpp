#ifdef __linux__
#include "stream.h"

#include <poll.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "bell.h"

namespace trinity {

Stream::Stream(int fd, const char* magic) : socket_(fd) {
  std::memcpy(magic_, magic, sizeof magic_);
}

void Stream::close() {
  if (is_open_) ::close(socket_.fd());
  is_open_ = false;
}

int Stream::lend() {
  for (int turn = 0; turn < 2; ++turn) {
    for (int slot = 0; slot < kNumSlots; ++slot)
      if (!slots_[slot].is_lent && !slots_[slot].is_away) return slots_[slot].is_lent = true, slot;
    while (ok() && socket_.is_readable() && take_one(now_s() + kPayloadS)) {
    }
  }
  return -1;
}

// Takes in what arrives meanwhile: two peers that send never wait for each other's full buffers.
void Stream::post(int slot, const Head& head, const Names& names) {
  Asked& asked = slots_[slot];
  asked.number += kNumSlots, asked.is_away = true, asked.head = head, asked.code = kDone;
  FrameHead frame = {};
  std::memcpy(frame.magic, magic_, sizeof magic_);
  std::memcpy(frame.op_id, names.op_id, strnlen(names.op_id, sizeof frame.op_id));
  frame.kind = kInfer, frame.dtype = static_cast<uint8_t>(head.format), frame.request = asked.number + slot + 1;
  frame.layer = static_cast<uint32_t>(head.layer), frame.epoch = names.epoch, frame.version = head.version, frame.left_s = head.left_s;
  frame.num_rows = head.num_rows, frame.dim = head.dim, frame.num_slots = head.num_slots, frame.priority = head.priority;
  const Places at(head.num_rows, head.dim, head.num_slots, head.format);
  const size_t num_rows = head.num_rows, num_slots = num_rows * head.num_slots;
  iovec all[] = {{&frame, sizeof frame},
                 {box(slot) + at.rows, bytes_of(head.format) * num_rows * head.dim},
                 {box(slot), 8 * num_slots},
                 {box(slot) + at.weights, 4 * num_slots}};
  iovec* pieces = all;
  const double until_s = now_s() + head.left_s;
  for (int num = 4; ok();) {
    short ready = 0;
    if (!socket_.send_some(pieces, num)) return close();
    if (!num) return;
    if (!socket_.wait(POLLIN | POLLOUT, until_s, ready) || ((ready & POLLIN) && !take_one(until_s))) return close();
  }
}

Code Stream::wait(int slot, double until_s) {
  while (slots_[slot].is_away) {
    if (!ok()) return kGone;
    if (!take_one(until_s)) return now_s() >= until_s ? kLate : kGone;
  }
  return slots_[slot].code;
}

bool Stream::take_one(double until_s) {
  FrameHead head;
  iovec piece = {&head, sizeof head};
  bool is_right = socket_.receive(&piece, 1, until_s) && !std::memcmp(head.magic, magic_, sizeof magic_) && head.request > 0;
  if (is_right) {
    const int slot = static_cast<int>((head.request - 1) % kNumSlots);
    Asked& asked = slots_[slot];
    is_right = asked.is_away && head.request == asked.number + slot + 1;
    if (is_right) is_right = head.kind == kAnswer ? take_rows(asked, slot, head, until_s) : head.kind == kFailure && take_failure(asked, head.num_rows, until_s);
    if (is_right) asked.is_away = false;
  }
  if (!is_right) close();
  return is_right;
}

bool Stream::take_rows(Asked& asked, int slot, const FrameHead& head, double until_s) {
  const Head& of = asked.head;
  if (head.num_rows != of.num_rows || head.dim != of.dim || head.num_slots || head.flags || head.dtype != of.format) return false;
  const Places at(of.num_rows, of.dim, of.num_slots, of.format);
  iovec piece = {box(slot) + at.answer, bytes_of(of.format) * of.num_rows * of.dim};
  return socket_.receive(&piece, 1, until_s);
}

// Why there are no rows, in words: asked again by Python, the shard tells it.
bool Stream::take_failure(Asked& asked, uint32_t num_bytes, double until_s) {
  if (num_bytes > kMostFailureBytes) return false;
  std::vector<char> text(num_bytes);
  iovec piece = {text.data(), text.size()};
  asked.code = kNotHere;
  return socket_.receive(&piece, 1, until_s);
}

}  // namespace trinity
#endif
