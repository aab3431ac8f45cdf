// What a caller gets through rings: the right rows or a code that says why not, whatever happens at the same time.
#include "pool.h"

using namespace trinity;

namespace {

const std::vector<int64_t> kAll = {0, 1, 2, 3, 4, 5, 6, 7};

void one_shard_computes_and_says_what_it_lacks() {
  Shard shard;
  shard.service->registry.publish({shard.layer(5, 0, kAll), shard.layer(6, 2, {0, 1})});
  Link link(shard);
  auto plan = plan_of({link.ring}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1));
  for (int i = 0; i < 300; ++i) {
    Tokens rows(1 + i % 40, i);
    if (i % 3 == 0) rows.ids[0] = -1;
    CHECK(called(plan, rows, rows.batch(5, 0)).code == kDone && rows.are_right(0));
  }
  Tokens rows(4, 1);
  CHECK(called(plan, rows, rows.batch(7, 0)).code == kNotHere);
  CHECK(called(plan, rows, rows.batch(5, 1)).code == kNotHere);
  CHECK(called(plan, rows, rows.batch(6, 2)).code == kNotHere);  // experts that are elsewhere
  CHECK(called(plan, rows, rows.batch(5, 0, -1)).code == kLate);
  rows.ids[3] = kExperts;
  CHECK(called(plan, rows, rows.batch(5, 0)).code == kBadFrame);
  rows.ids[3] = -1;
  CHECK(called(plan, rows, rows.batch(5, 0)).code == kDone && rows.are_right(0));
  Tokens many(kBoxBytes / kDim / 8 + 1, 0);
  CHECK(called(plan, many, many.batch(5, 0)).code == kTooLarge);
}

void shards_share_the_rows_and_replicas_take_turns() {
  Shard shards[2];
  for (Shard& shard : shards) shard.service->registry.publish({shard.layer(0, 0, kAll)});
  Link links[] = {Link(shards[0]), Link(shards[1])};
  std::vector<int32_t> halves, both;
  for (int32_t e = 0; e < kExperts; ++e) halves.push_back(e / 4), both.push_back(0), both.push_back(1);
  for (auto& plan : {plan_of({links[0].ring, links[1].ring}, halves, std::vector<int32_t>(kExperts, 1)),
                     plan_of({links[0].ring, links[1].ring}, both, std::vector<int32_t>(kExperts, 2))})
    for (int i = 0; i < 100; ++i) {
      Tokens rows(1 + i % 20, i);
      CHECK(called(plan, rows, rows.batch(0, 0)).code == kDone && rows.are_right(0));
    }
  Tokens rows(20, 1);
  CHECK(called(plan_of({links[0].ring, nullptr}, halves, std::vector<int32_t>(kExperts, 1)), rows, rows.batch(0, 0)).code == kNoRing);
  int64_t counted = 0;
  for (Shard& shard : shards)
    for (auto& each : shard.service->registry.take_counts()) counted += std::get<2>(each);
  int64_t sent = 0;
  for (int i = 0; i < 100; ++i) sent += 2 * kTopK * (1 + i % 20);
  CHECK(counted == sent);
}

void a_shard_that_does_not_answer_takes_boxes_until_it_does() {
  Shard shard;
  shard.service->registry.publish({shard.layer(0, 0, kAll)});
  Link link(shard);
  link.attachment->stop();  // as a process that is stopped: it is there, and does nothing
  auto plan = plan_of({link.ring}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1));
  Tokens rows(3, 0);
  for (int i = 0; i < kNumSlots; ++i) CHECK(called(plan, rows, rows.batch(0, 0, 0.02)).code == kLate);
  CHECK(called(plan, rows, rows.batch(0, 0, 0.02)).code == kNoBox);
  link.attachment = Attachment::make(shard.service, link.fd);  // takes all four, late
  while (called(plan, rows, rows.batch(0, 0)).code == kNoBox) usleep(100);
  CHECK(called(plan, rows, rows.batch(0, 0)).code == kDone && rows.are_right(0));
  link.attachment->stop();
  shutdown(link.ends[1], SHUT_RDWR);  // as a process that was killed
  CHECK(called(plan, rows, rows.batch(0, 0)).code == kGone);
}

void versions_come_and_go_under_callers() {
  Shard shard;
  std::vector<LayerPtr> layers;
  for (int64_t version = 0; version < 40; ++version) layers.push_back(shard.layer(0, version, kAll));
  shard.service->registry.publish({layers[0]});
  std::atomic<int64_t> newest{0};
  std::atomic<int> num_done{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&, c] {
      Link link(shard);
      auto plan = plan_of({link.ring}, std::vector<int32_t>(kExperts, 0), std::vector<int32_t>(kExperts, 1));
      for (int i = 0; newest.load() < 39 || i < 50; ++i) {
        Tokens rows(1 + i % 9, i + 1000 * c);
        const int64_t version = newest.load();
        const Code code = called(plan, rows, rows.batch(0, version)).code;
        CHECK(code == kDone ? rows.are_right(version) : code == kNotHere);
        num_done += code == kDone;
      }
    });
  for (int64_t version = 1; version < 40; ++version) {
    for (const int before = num_done.load(); num_done.load() < before + 5;) usleep(50);
    shard.service->registry.publish({layers[version - 1], layers[version]});
    if (version > 1) std::fill(shard.factors[version - 2]->begin(), shard.factors[version - 2]->end(), NAN);  // written anew
    newest = version;
  }
  for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
  one_shard_computes_and_says_what_it_lacks();
  shards_share_the_rows_and_replicas_take_turns();
  a_shard_that_does_not_answer_takes_boxes_until_it_does();
  versions_come_and_go_under_callers();
  std::puts("ring: right");
}
