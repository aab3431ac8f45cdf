// Frames of the direct transport (actors/dataplane/frames.py) on a socket, as C++ reads and writes them: inference and its answers.
//
// Decisions: a head is read into private memory and checked in 64 bits before a byte of what follows is read; everything has a
// deadline, and a peer that drips is as late as one that is silent; what is not plain inference is left to Python.
#pragma once
#include <cmath>
#include <cstdint>
#include <sys/uio.h>

#include "layout.h"

namespace trinity {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "frames are little-endian");

enum FrameKind : uint8_t { kInfer = 1, kAnswer = 3, kFailure = 4 };

constexpr uint32_t kMostFailureBytes = 1u << 16;
constexpr double kPayloadS = 60.0;  // for the rest of a frame whose own deadline is nearer
constexpr int64_t kPatient = INT64_MAX;  // rows of this priority are Python's: they give way to others

struct __attribute__((packed)) FrameHead {
  char magic[4];
  uint8_t kind, dtype, flags, box;
  uint64_t request;
  char op_id[40];
  uint32_t layer;
  int64_t epoch, version;
  double left_s;
  uint32_t num_rows, dim, num_slots;
  int64_t priority;
};
static_assert(sizeof(FrameHead) == 104, "HEADER of frames.py");

// Whether it is an inference that C++ may compute, and that a box has room for.
inline bool is_plain(const FrameHead& head) {
  if (head.kind != kInfer || head.dtype > kRowsBf16 || head.flags || head.priority == kPatient || !std::isfinite(double{head.left_s})) return false;
  if (head.num_rows == 0 || head.dim == 0 || head.num_slots == 0 || head.num_slots > kMostSlotsOfRow) return false;
  if (head.num_rows > kBoxBytes || head.dim > kBoxBytes || head.layer > INT32_MAX) return false;
  return Places(head.num_rows, head.dim, head.num_slots, head.dtype).end <= kBoxBytes;
}

// Private memory of boxes; pages that nobody has touched cost nothing.
class Boxes {
 public:
  explicit Boxes(int num);
  ~Boxes();
  Boxes(const Boxes&) = delete;
  Boxes& operator=(const Boxes&) = delete;
  bool ok() const { return memory_ != nullptr; }
  char* box(int slot) const { return memory_ + static_cast<uint64_t>(slot) * kBoxBytes; }

 private:
  uint64_t num_bytes_;
  char* memory_ = nullptr;
};

// A connected socket, with whole buffers until a deadline. Who made it has set its options, and a tick after which a receive
// returns for a look at the clock (connection.py), and closes it.
class FrameSocket {
 public:
  explicit FrameSocket(int fd) : fd_(fd) {}
  int fd() const { return fd_; }
  bool receive(iovec* pieces, int num, double until_s);
  // A part of it; waits until something may be done. False: it has ended.
  bool send_some(iovec*& pieces, int& num);
  bool wait(short events, double until_s, short& ready);  // false: late, or its host is silent
  bool is_readable();

 private:
  bool is_over(double until_s);
  int fd_;
};

}  // namespace trinity
