// A caller's way to a shard of another host: frames on a connection that Python made, with nobody else on it.
//
// Decisions: boxes are private memory; answers are matched by number, in any order, and one that nobody waits for any more goes
// into the box that its request had. A connection in doubt (late, broken, answers that are none) is closed, and Python makes another.
#pragma once
#include "frames.h"
#include "way.h"

namespace trinity {

class Stream : public Way {
 public:
  Stream(int fd, const char* magic);  // owns the descriptor
  ~Stream() override { close(); }
  bool ok() const override { return is_open_ && boxes_.ok(); }
  bool is_far() const override { return true; }
  void close() override;
  int lend() override;
  void take_back(int slot) override { slots_[slot].is_lent = false; }
  char* box(int slot) const override { return boxes_.box(slot); }
  void post(int slot, const Head& head, const Names& names) override;
  Code wait(int slot, double until_s) override;

 private:
  struct Asked {
    bool is_lent = false, is_away = false;
    uint64_t number = 0;
    Head head = {};
    Code code = kDone;
  };
  bool take_one(double until_s);  // an answer; false: the connection is of no more use
  bool take_rows(Asked& asked, int slot, const FrameHead& head, double until_s);
  bool take_failure(Asked& asked, uint32_t num_bytes, double until_s);

  FrameSocket socket_;
  bool is_open_ = true;
  Boxes boxes_{kNumSlots};
  char magic_[4];
  Asked slots_[kNumSlots];
};

}  // namespace trinity
