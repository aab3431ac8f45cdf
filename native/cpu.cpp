#include "cpu.h"

namespace trinity {

namespace {

Isa asked() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::generic;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return Isa::avx512_bf16;
#else
  return Isa::generic;
#endif
}

}  // namespace

Isa isa() {
  static const Isa found = asked();
  return found;
}

const char* isa_name() {
  static const char* const names[] = {"generic", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa())];
}

}  // namespace trinity
