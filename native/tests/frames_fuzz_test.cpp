// Random bytes on a connection between hosts, to a shard and to a caller: nobody crashes or waits for ever, and the next sound call is
// answered. Argument: how many frames.
#include "pool.h"
#include "ring/served.h"
#include "ring/stream.h"

using namespace trinity;

namespace {

constexpr char kMagicOfFrames[] = "TRNx";

void ticks(int fd) {
  const timeval tick = {0, 50000};
  CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof tick) == 0);
}

struct Ends {
  int caller, shard;
  Ends() {
    int both[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, both) == 0);
    caller = both[0], shard = both[1];
    ticks(caller), ticks(shard);
  }
};

// A frame that is nearly right more often than not.
FrameHead spoiled(std::mt19937& random, uint8_t kind) {
  FrameHead head = {};
  std::memcpy(head.magic, kMagicOfFrames, 4);
  head.kind = kind, head.request = random() % 12, head.left_s = 60, head.num_rows = 1 + random() % 8, head.dim = kDim;
  head.num_slots = kind == kInfer ? kTopK : 0;
  char* bytes = reinterpret_cast<char*>(&head);
  for (uint32_t num = random() % 3; num; --num) bytes[random() % sizeof head] = static_cast<char>(random() % 3 ? random() % 8 : random());
  return head;
}

std::string said(std::mt19937& random, uint8_t kind) {
  const FrameHead head = spoiled(random, kind);
  std::string all(reinterpret_cast<const char*>(&head), sizeof head);
  const size_t num_rows = 1 + random() % 8;
  for (size_t i = 0; i < num_rows * kDim; ++i) all.append("\0\0\x80\x3f", 4);
  for (size_t i = 0; kind == kInfer && i < num_rows * kTopK; ++i) {
    const int64_t id = random() % 16 ? static_cast<int64_t>(random() % 9) - 1 : static_cast<int64_t>(random()) << (random() % 32);
    all.append(reinterpret_cast<const char*>(&id), 8);
  }
  if (kind == kInfer) all.append(4 * num_rows * kTopK, '\0');
  return all;
}

void tell(int fd, const std::string& words) { CHECK(send(fd, words.data(), words.size(), MSG_NOSIGNAL) >= 0 || errno == EPIPE || errno == ECONNRESET); }

// Frames of nonsense to a shard, some to a connection: it ends, or the frame is Python's.
long to_a_shard(std::mt19937& random, const Shard& shard, long num_frames) {
  long num_kinds[3] = {};
  for (long i = 0; i < num_frames;) {
    Ends ends;
    for (uint32_t num = 1 + random() % 2; num; --num, ++i) tell(ends.caller, said(random, kInfer));
    shutdown(ends.caller, SHUT_WR);
    Served served(shard.service, ends.shard, kMagicOfFrames);
    ++num_kinds[served.next()];
    for (int fd : {ends.caller, ends.shard}) close(fd);
  }
  CHECK(num_kinds[Served::kEnded] && num_kinds[Served::kHead] && num_kinds[Served::kWhole]);
  return num_kinds[Served::kEnded];
}

// Answers that are mostly none, to a caller.
long to_a_caller(std::mt19937& random, long num_frames) {
  long num_done = 0;
  for (long i = 0; i < num_frames;) {
    Ends ends;
    auto stream = std::make_shared<Stream>(ends.caller, kMagicOfFrames);
    auto plan = plan_of({stream}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1));
    for (uint32_t num = 1 + random() % 2; num; --num, ++i) tell(ends.shard, said(random, random() % 4 ? kAnswer : kFailure));
    shutdown(ends.shard, SHUT_WR);
    for (int call = 0; call < 3 && stream->ok(); ++call) {
      Tokens rows(1 + random() % 8, 1);
      num_done += called(plan, rows, rows.batch(0, 0)).code == kDone;
    }
    close(ends.shard);
  }
  return num_done;
}

void sound_calls(const Shard& shard) {
  Ends ends;
  std::thread serving([&] {
    Served served(shard.service, ends.shard, kMagicOfFrames);
    while (served.next() == Served::kWhole) {  // what Python would answer, by a failure
      FrameHead head = served.head;
      head.kind = kFailure, head.num_rows = 3;
      tell(ends.shard, std::string(reinterpret_cast<const char*>(&head), sizeof head) + "{}\n");
    }
  });
  auto stream = std::make_shared<Stream>(ends.caller, kMagicOfFrames);
  auto plan = plan_of({stream}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1));
  for (int i = 0; i < 300; ++i) {
    Tokens rows(1 + i % 40, i);
    CHECK(called(plan, rows, rows.batch(0, 0)).code == kDone && rows.are_right(0));
    if (i % 3 == 0) CHECK(called(plan, rows, rows.batch(0, 9)).code == kNotHere && stream->ok());
    if (i % 5 == 0) {  // more on their way than are taken
      Pending first(plan), second(plan);
      CHECK(first.begin(rows.batch(0, 0)).code == kDone && second.begin(rows.batch(0, 0)).code == kDone);
      first.abandon();
      CHECK(second.finish(reinterpret_cast<char*>(rows.y.data()), now_s() + 60).code == kDone && rows.are_right(0));
    }
  }
  Tokens many(8000, 1);  // all slots, with more than the sockets hold, both ways
  std::vector<std::unique_ptr<Pending>> away;
  for (int i = 0; i < kNumSlots; ++i) {
    away.push_back(std::make_unique<Pending>(plan));
    CHECK(away.back()->begin(many.batch(0, 0)).code == kDone);
  }
  CHECK(Pending(plan).begin(many.batch(0, 0)).code == kNoBox);
  for (auto& each : away) CHECK(each->finish(reinterpret_cast<char*>(many.y.data()), now_s() + 60).code == kDone && many.are_right(0));
  Tokens rows(3, 1);
  CHECK(called(plan, rows, rows.batch(0, 0, -1)).code != kDone);
  stream->close();
  CHECK(called(plan, rows, rows.batch(0, 0)).code == kGone);
  serving.join();
  close(ends.shard);
}

}  // namespace

int main(int argc, char** argv) {
  Nonsense nonsense(argc, argv);
  auto& [num_frames, random, shard] = nonsense;
  sound_calls(shard);
  const long num_ended = to_a_shard(random, shard, num_frames / 2), num_done = to_a_caller(random, num_frames / 2);
  sound_calls(shard);
  std::printf("frames: %ld of nonsense; %ld connections to the shard ended, %ld answers taken for right\n", num_frames, num_ended, num_done);
}
