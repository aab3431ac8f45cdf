// Random bytes on both sides of a ring: nobody crashes, and the next sound request is answered. Argument: how many frames.
#include "pool.h"

using namespace trinity;

namespace {

// A head that is nearly right more often than not, so that what lies behind the first check is reached, too.
Head spoiled(std::mt19937& random) {
  Head head = {0, 0, 0, 1.0, 0, 1 + static_cast<uint32_t>(random() % 8), kDim, kTopK, kRowsF32, 0};
  uint32_t* words = reinterpret_cast<uint32_t*>(&head);
  for (uint32_t num = random() % 4; num; --num) words[2 + random() % (sizeof(Head) / 4 - 2)] = random() % 3 ? random() % 64 : static_cast<uint32_t>(random());
  return head;
}

void scribble(std::mt19937& random, char* to, size_t num_bytes) {
  for (size_t i = 0; i < num_bytes; i += 4) {
    const uint32_t word = static_cast<uint32_t>(random() % 2 ? random() : random() % 16);
    std::memcpy(to + i, &word, 4);
  }
}

// Ids that are mostly experts of the layer, then anything.
void fill(std::mt19937& random, char* box) {
  int64_t ids[24];
  for (int64_t& id : ids) id = static_cast<int64_t>(random() % 9) - 1;
  if (random() % 4 == 0) ids[random() % 24] = static_cast<int64_t>(random()) << (random() % 32);
  scribble(random, box, 64 + random() % 512);
  if (random() % 4) std::memcpy(box, ids, sizeof ids);
}

}  // namespace

int main(int argc, char** argv) {
  Nonsense nonsense(argc, argv);
  auto& [num_frames, random, shard] = nonsense;
  Link link(shard);
  Mapping memory(link.fd);
  auto plan = plan_of({link.ring}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1));
  long codes[kGone + 1] = {};
  for (long i = 0; i < num_frames; ++i) {
    const int slot = link.ring->lend();
    CHECK(slot >= 0);
    fill(random, link.ring->box(slot));
    link.ring->post(slot, spoiled(random), {});
    link.ring->wake();
    if (random() % 64 == 0) scribble(random, link.ring->box(slot), 256);  // while it is read
    ++codes[link.ring->wait(slot, now_s() + 60, 1)];
    link.ring->take_back(slot);
    if (random() % 256 == 0) {  // an answer that is none
      Tokens rows(2, 1);
      Pending pending(plan);
      CHECK(pending.begin(rows.batch(0, 0)).code == kDone);
      scribble(random, reinterpret_cast<char*>(&memory.control().slots[0].answer), sizeof(Answer));
      pending.finish(reinterpret_cast<char*>(rows.y.data()), now_s() + 60);
    }
    if (i % 1000 == 999) {
      Tokens rows(5, 2);
      CHECK(called(plan, rows, rows.batch(0, 0)).code == kDone && rows.are_right(0));
    }
  }
  // The words that both sides wait at, and the heads beside them: from here on only that nobody crashes or hangs is promised.
  for (long i = 0; i < num_frames / 100; ++i) {
    scribble(random, reinterpret_cast<char*>(memory.control().slots), kNumSlots * sizeof(Slot));
    memory.control().asked.value.store(static_cast<uint32_t>(random()));
    ring_bell(memory.control().asked);
    Tokens rows(2, 3);
    called(plan, rows, rows.batch(0, 0, 0.0005));
  }
  Link fresh(shard);
  Tokens rows(5, 4);
  CHECK(called(plan_of({fresh.ring}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1)), rows, rows.batch(0, 0)).code == kDone);
  std::printf("fuzz: %ld frames, codes", num_frames);
  for (long each : codes) std::printf(" %ld", each);
  std::puts("");
  CHECK(rows.are_right(0));
  CHECK(codes[kDone] && codes[kBadFrame] && codes[kNotHere]);
}
