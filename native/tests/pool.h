// Shards and a caller in one process, over the same memory that two would share: what the tests of the ring stand on.
#pragma once
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "ring/caller.h"
#include "ring/service.h"

#define CHECK(holds)                                                    \
  do {                                                                  \
    if (!(holds)) {                                                     \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #holds);  \
      std::exit(1);                                                     \
    }                                                                   \
  } while (false)

namespace trinity {

constexpr int64_t kDim = 24, kExperts = 8, kTopK = 3;

// An expert that multiplies its rows by its number in the checkpoint, plus the version: easy to know without a ring.
inline void scale(const ExpertCall* call) {
  const float* factors = static_cast<const float*>(call->stacks[0]);
  for (int64_t e = 0, a = 0; e < call->num_experts; ++e)
    for (; a < call->end[e]; ++a)
      for (int64_t d = 0; d < call->dim; ++d)
        call->y[a * call->dim + d] = static_cast<const float*>(call->x)[call->row[a] * call->dim + d] * call->weight[a] * factors[e];
}

struct Shard {
  std::shared_ptr<Service> service = std::make_shared<Service>();
  std::vector<std::unique_ptr<std::vector<float>>> factors;

  LayerPtr layer(int32_t number, int64_t version, std::vector<int64_t> experts) {
    auto made = std::make_shared<Layer>();
    made->layer = number, made->version = version, made->format = kRowsF32, made->dim = kDim, made->hidden = 1, made->kernel = scale;
    made->position.assign(kExperts, kNotHeld);
    factors.push_back(std::make_unique<std::vector<float>>());
    for (size_t e = 0; e < experts.size(); ++e) {
      made->position[experts[e]] = static_cast<int32_t>(e);
      factors.back()->push_back(static_cast<float>(experts[e] + 1 + 100 * version));
    }
    made->rows.assign(experts.size(), 0);
    made->experts = std::move(experts);
    for (auto& stack : made->stacks) stack = factors.back()->data();
    return made;
  }
};

// What a test of nonsense stands on: how many frames of it (its argument), and a shard with a whole layer and one of two experts.
struct Nonsense {
  long num_frames;
  std::mt19937 random{7};
  Shard shard;

  Nonsense(int argc, char** argv) : num_frames(argc > 1 ? std::atol(argv[1]) : 20000) {
    shard.service->registry.publish({shard.layer(0, 0, {0, 1, 2, 3, 4, 5, 6, 7}), shard.layer(1, 0, {2, 3})});
  }
};

struct Link {  // a connection: a socket, a ring, and the thread that serves it
  int fd = memfd_create("ring", MFD_CLOEXEC), ends[2];
  std::shared_ptr<Ring> ring;
  std::unique_ptr<Attachment> attachment;

  explicit Link(const Shard& shard) {
    CHECK(ftruncate(fd, kRingBytes) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    ring = std::make_shared<Ring>(fd, ends[0]);
    attachment = Attachment::make(shard.service, fd);
    CHECK(attachment);
  }
  ~Link() {
    attachment.reset();
    for (int each : {fd, ends[0], ends[1]}) close(each);
  }
};

struct Tokens {
  std::vector<float> x, weights, y;
  std::vector<int64_t> ids;
  int64_t num;

  Tokens(int64_t num_tokens, uint32_t seed) : x(num_tokens * kDim), weights(num_tokens * kTopK), y(num_tokens * kDim), ids(num_tokens * kTopK), num(num_tokens) {
    std::mt19937 random(seed);
    for (float& each : x) each = static_cast<float>(random() % 1000) / 8;
    for (float& each : weights) each = static_cast<float>(random() % 16) / 16;
    for (int64_t t = 0; t < num; ++t)
      for (int64_t k = 0; k < kTopK; ++k) ids[t * kTopK + k] = (random() % 2 + 2 * k + t) % kExperts;
  }
  Batch batch(int32_t layer, int64_t version, double left_s = 60) const {
    return {layer, version, 0, now_s() + left_s, kRowsF32, reinterpret_cast<const char*>(x.data()), ids.data(), weights.data(), num, kDim, kTopK};
  }
  bool are_right(int64_t version) const {
    for (int64_t t = 0; t < num; ++t)
      for (int64_t d = 0; d < kDim; ++d) {
        double sum = 0;
        for (int64_t k = 0; k < kTopK; ++k)
          if (ids[t * kTopK + k] >= 0) sum += static_cast<double>(x[t * kDim + d]) * weights[t * kTopK + k] * static_cast<double>(ids[t * kTopK + k] + 1 + 100 * version);
        if (std::fabs(sum - y[t * kDim + d]) > 1e-3 * (1 + std::fabs(sum))) return false;
      }
    return true;
  }
};

inline std::shared_ptr<Plan> plan_of(std::vector<WayPtr> rings, std::vector<int32_t> shard, std::vector<int32_t> num_replicas) {
  bool is_replicated = false;
  for (int32_t each : num_replicas) is_replicated |= each > 1;
  return std::make_shared<Plan>(Plan{std::move(rings), std::move(shard), std::move(num_replicas), is_replicated, 0, false});
}

inline Failure called(const std::shared_ptr<Plan>& plan, Tokens& rows, const Batch& batch) {
  Pending pending(plan);
  const Failure failure = pending.begin(batch);
  return failure.code == kDone ? pending.finish(reinterpret_cast<char*>(rows.y.data()), batch.until_s) : failure;
}

}  // namespace trinity
