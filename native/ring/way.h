// One way from a caller to a shard: slots, each with a box for a request and its answer (layout.h), and who carries them.
//
// Decisions: a caller fills a box, posts it, wakes who takes it, and waits; which way it is concerns nobody else. A slot whose
// answer nobody waits for any more is free again when the answer has come. For one thread at a time.
#pragma once
#include <memory>

#include "layout.h"

namespace trinity {

struct Names {  // of a call, where its way carries them
  int64_t epoch = 0;
  const char* op_id = "";
};

class Way {
 public:
  virtual ~Way() = default;
  virtual bool ok() const = 0;  // may be used, as far as is known
  virtual bool is_far() const { return false; }  // a post may take long
  virtual void close() = 0;
  virtual int lend() = 0;  // a slot that nobody uses, or -1
  virtual void take_back(int slot) = 0;
  virtual char* box(int slot) const = 0;
  virtual void post(int slot, const Head& head, const Names& names) = 0;  // the box is filled
  virtual void wake() {}                                                  // after posts to all ways: whoever takes them
  virtual Code wait(int slot, double until_s) = 0;
};

using WayPtr = std::shared_ptr<Way>;

}  // namespace trinity
