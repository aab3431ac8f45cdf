// Which instructions are used: the best that this processor has, found out once.
#include <stdlib.h>

#include <atomic>
#include <new>

#include "table.h"

namespace trinity {
namespace {

const Table *const kTables[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kGeneric};

const Table *best() {
  for (const Table *table : kTables)
    if (table->is_there()) return table;
  return &kGeneric;
}

std::atomic<const Table *> &used() {
  static std::atomic<const Table *> table{best()};
  return table;
}

const Table &table() { return *used().load(std::memory_order_relaxed); }

struct Memory {
  void *at = nullptr;
  int64_t size = 0;
  ~Memory() { free(at); }
};

}  // namespace

void *scratch(int64_t num_bytes) {
  thread_local Memory memory;
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

const char *instruction_set() { return table().name; }

bool use_instruction_set(const char *name) {
  for (const Table *table : kTables)
    if (table->is_there() && !__builtin_strcmp(table->name, name)) {
      used().store(table, std::memory_order_relaxed);
      return true;
    }
  return false;
}

const char *const *instruction_sets() {
  static const char *names[sizeof kTables / sizeof *kTables + 1];
  int num = 0;
  for (const Table *table : kTables)
    if (table->is_there()) names[num++] = table->name;
  names[num] = nullptr;
  return names;
}

}  // namespace trinity
