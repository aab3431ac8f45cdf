// The processor's instructions, asked once: which variant of a kernel runs. Later ones include those before them.
#pragma once

namespace trinity {

enum class Isa { generic, avx2, avx512, avx512_bf16 };  // avx2 with fma; avx512 f, bw, dq, vl; the last with bf16 and vnni

Isa isa();
const char* isa_name();

}  // namespace trinity
