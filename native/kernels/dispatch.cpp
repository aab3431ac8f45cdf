// Which instructions are used: all that this processor has.
#include <stdlib.h>

#include <atomic>
#include <new>

#include "table.h"

namespace trinity {
namespace {

#if defined(__x86_64__)
const Table *const kTables[] = {&kGeneric, &kAvx2, &kAvx512, &kAvx512Bf16};  // by Isa
#else
const Table *const kTables[] = {&kGeneric};
#endif

std::atomic<const Table *> &used() {
  static std::atomic<const Table *> table{kTables[static_cast<int>(isa())]};
  return table;
}

const Table &table() { return *used().load(std::memory_order_relaxed); }

struct Memory {
  void *at = nullptr;
  int64_t size = 0;
  ~Memory() { free(at); }
};

}  // namespace

void *scratch(int which, int64_t num_bytes) {
  thread_local Memory memories[kScratches];
  Memory &memory = memories[which];
  if (memory.size < num_bytes) {
    free(memory.at);
    memory.size = 0;
    memory.at = aligned_alloc(64, static_cast<size_t>((num_bytes + 63) / 64 * 64));
    if (!memory.at) throw std::bad_alloc();
    memory.size = num_bytes;
  }
  return memory.at;
}

void round_rows(Format format, const float *x, int64_t num, int64_t k, void *values, float *scale) {
  table().round_rows(format, x, num, k, values, scale);
}

int64_t units_of(Format format, int64_t n, int64_t k) {
  const int64_t tiles = panel_of(format, k);
  return (quarter_of(n) + tiles - 1) / tiles;
}

void multiply(const Product &product, int64_t first, int64_t last) { table().multiply(product, first, last); }

void feed_forward(const FeedForward &layer, int64_t first, int64_t last) { table().feed_forward(layer, first, last); }

void use(Isa chosen) { used().store(kTables[static_cast<int>(chosen < isa() ? chosen : isa())], std::memory_order_relaxed); }

}  // namespace trinity
