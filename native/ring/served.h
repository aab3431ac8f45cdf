// A shard's connection, of any host: plain inference is computed and answered here; every other frame is its Python thread's.
#pragma once
#include <memory>

#include "frames.h"
#include "service.h"

namespace trinity {

class Served {
 public:
  Served(std::shared_ptr<Service> service, int fd, const char* magic);
  enum Next { kEnded, kHead, kWhole };
  // Serves until the peer has gone, or something comes that is not plain, or cannot be computed here: then its head is read, or
  // all of it.
  Next next();
  FrameHead head;
  const iovec* payload() const { return payload_; }  // in the order of the frame, three pieces

 private:
  Code computed(double came_s);
  bool answered();

  std::shared_ptr<Service> service_;
  FrameSocket socket_;
  Boxes boxes_{1};
  iovec payload_[3];
  char magic_[4];
};

}  // namespace trinity
