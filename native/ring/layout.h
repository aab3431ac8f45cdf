// Memory of a ring: what both ends of a connection see. The caller makes it and fills it in, the shard checks all that it reads.
//
// Legend: T tokens, R rows, D model, K slots of a row.
// A caller puts a request into a slot's box: ids [R, K] int64, weights [R, K] float32, rows [R, D] of a format, each from a multiple of
// 64 bytes on; the answer's rows [R, D] come behind them. Then it counts `asked` of the slot up and rings; the shard sets
// `answered` to that number when the answer is there. Decisions: only these words say what is where, and each side believes its
// own copy of them; a slot is free for the caller when `answered` is what it asked last, so that an answer which nobody waits
// for any more comes into memory that nobody else has.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace trinity {

constexpr uint32_t kMagic = 0x33475254;  // "TRG3": another layout is another number
constexpr int kNumSlots = 4;
constexpr uint64_t kBoxBytes = 4u << 20;
constexpr uint32_t kMostSlotsOfRow = 64;

enum RowFormat : uint32_t { kRowsF32 = 0, kRowsBf16 = 1 };  // of rows

constexpr uint64_t bytes_of(uint32_t format) { return format == kRowsF32 ? 4 : 2; }

enum Code : uint32_t {  // why there is no answer; anything but kDone is then asked again over the socket
  kDone = 0,
  kBadFrame,   // not what this layer takes
  kNotHere,    // layer, version or expert: the shard says by name what is wrong, when it is asked over the socket
  kNoRing,     // rows are for a shard that this caller has no ring to
  kNoBox,      // all slots are taken
  kTooLarge,   // for a box
  kLate,       // the time was up
  kGone,       // the process at the other end has ended
};

struct Head {
  uint64_t number;  // of the request, among those of its slot
  int64_t version, priority;
  double left_s;  // until nobody waits for the answer, when it was asked: clocks of two processes need not agree
  int32_t layer;
  uint32_t num_rows, dim, num_slots, format, unused;
};

struct Answer {
  uint64_t number;
  uint64_t code;
};

// A word to wait at; `waiting` tells who changes it that there is somebody to wake.
struct Bell {
  std::atomic<uint32_t> value, waiting;
};

struct alignas(64) Slot {
  alignas(64) Head head;
  std::atomic<uint32_t> asked;
  alignas(64) Answer answer;
  Bell answered;
};

struct Control {
  uint32_t magic, num_slots;
  uint64_t box_bytes;
  alignas(64) Bell asked;
  std::atomic<int32_t> caller_cpu;
  std::atomic<uint32_t> is_crowded;  // the caller asks several shards of one core: who spins there keeps the others from it
  alignas(64) std::atomic<int32_t> shard_cpu;
  std::atomic<uint32_t> is_shared;  // the shard answers more callers than there are cores: the others need this one's
  Slot slots[kNumSlots];
};

constexpr uint64_t kControlBytes = 4096;
constexpr uint64_t kRingBytes = kControlBytes + kNumSlots * kBoxBytes;
static_assert(sizeof(Control) <= kControlBytes, "the control page is one page");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "both processes must see one word");

// Places in a box. 64 bits: no sizes from 32 can overflow them.
struct Places {
  uint64_t weights, rows, answer, end;

  Places(uint64_t num_rows, uint64_t dim, uint64_t num_slots, uint32_t format)
      : weights(up(8 * num_rows * num_slots)),
        rows(weights + up(4 * num_rows * num_slots)),
        answer(rows + up(bytes_of(format) * num_rows * dim)),
        end(answer + up(bytes_of(format) * num_rows * dim)) {}

 private:
  static uint64_t up(uint64_t bytes) { return (bytes + 63) & ~uint64_t{63}; }
};

// One read of each word: what the peer writes afterwards is not seen.
template <class T>
T read_once(const T& shared) {
  static_assert(sizeof(T) % 8 == 0, "whole words");
  T own;
  const volatile uint64_t* from = reinterpret_cast<const volatile uint64_t*>(&shared);
  uint64_t words[sizeof(T) / 8];
  for (size_t i = 0; i < sizeof(T) / 8; ++i) words[i] = from[i];
  __builtin_memcpy(&own, words, sizeof(T));
  return own;
}

}  // namespace trinity
