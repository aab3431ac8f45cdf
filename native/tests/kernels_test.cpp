// The kernels under sanitizers: matrices end where their memory does, so that a read beyond a row's end is found; all sets of
// instructions give the same bits.
#include <stdio.h>
#include <stdlib.h>

#include <cstring>
#include <memory>
#include <vector>

#include "kernels/kernels.h"

using namespace trinity;

namespace {

uint64_t state = 88172645463325252ull;

float number() {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return static_cast<float>(static_cast<int64_t>(state >> 40) - (1 << 23)) / (1 << 23);
}

int size_of_one(Format format) { return format == kFloat32 ? 4 : format == kBfloat16 ? 2 : 1; }

bool is_packed(Format format) { return format == kFp8 || format == kNvfp4; }  // rows are float32

struct Matrix {  // [1, N, K], in a block of exactly its size
  std::unique_ptr<char[]> values;
  std::vector<float> scale;
  std::vector<int32_t> total;
  Matrices as;
};

char code() {  // of a number
  const int32_t bits = static_cast<int32_t>(number() * 128) & 0xff;
  return static_cast<char>((bits & 0x7f) == 0x7f ? 0 : bits);
}

Matrix packed(Format format, int64_t n, int64_t k) {
  const size_t size = static_cast<size_t>(n * k) / (format == kFp8 ? 1 : 2);
  const size_t scales = static_cast<size_t>((n / 128 + 1) * (k / 128 + 1));
  Matrix m{std::unique_ptr<char[]>(new char[size]), std::vector<float>(scales), std::vector<int32_t>(n * k / 64), {}};
  for (size_t i = 0; i < size; i++) m.values[i] = code();
  for (float &scale : m.scale) scale = number();
  for (size_t i = 0; i < m.total.size() * 4; i++) reinterpret_cast<char *>(m.total.data())[i] = code();
  m.as = {m.values.get(), m.scale.data(), m.total.data(), n, k};
  return m;
}

Matrix matrix(Format format, int64_t n, int64_t k) {
  if (is_packed(format)) return packed(format, n, k);
  std::vector<float> x(static_cast<size_t>(n * k));
  for (float &v : x) v = number();
  Matrix m{std::unique_ptr<char[]>(new char[static_cast<size_t>(n * k * size_of_one(format))]), std::vector<float>(n), std::vector<int32_t>(n), {}};
  round_rows(format, x.data(), n, k, m.values.get(), m.scale.data());
  if (format == kInt8)  // rows are uint8, weights are int8
    for (int64_t i = 0; i < n * k; i++) m.total[i / k] += m.values[i] = static_cast<char>(m.values[i] + 128);
  const bool has_scale = format == kInt8;
  m.as = {m.values.get(), has_scale ? m.scale.data() : nullptr, has_scale ? m.total.data() : nullptr, n, k};
  return m;
}

std::vector<float> computed(Format format, int64_t num, int64_t d, int64_t f, Isa isa) {
  use(isa);
  state = 88172645463325252ull;
  const Matrix gate = matrix(format, f, d), up = matrix(format, f, d), down = matrix(format, d, f);
  std::vector<float> x(static_cast<size_t>(num * d)), scale(num), y(static_cast<size_t>(num * (d + f)));
  for (float &v : x) v = number();
  const Format as = is_packed(format) ? kFloat32 : format;
  std::unique_ptr<char[]> values(new char[static_cast<size_t>(num * d * size_of_one(as))]);
  round_rows(as, x.data(), num, d, values.get(), scale.data());
  const Rows rows = {values.get(), format == kInt8 ? scale.data() : nullptr, nullptr};
  const int64_t zero = 0;
  feed_forward({format, rows, gate.as, up.as, down.as, nullptr, y.data(), &zero, &zero, &num}, 0, 1);
  multiply({format, rows, up.as, &num, y.data() + num * d, f}, 0, units_of(format, f, d));
  return y;
}

}  // namespace

int main() {
  for (Format format : {kFloat32, kBfloat16, kInt8, kFp8, kNvfp4})
    for (int64_t num : {1, 2, 3, 7, 15, 70})
      for (int64_t d : {1, 15, 33, 64, 100, 192})
        for (int64_t f : {1, 7, 48}) {
          if (format == kNvfp4 && (d % 16 || f % 16)) continue;
          const std::vector<float> want = computed(format, num, d, f, Isa::generic);
          for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
            const std::vector<float> got = computed(format, num, d, f, isa);
            if (std::memcmp(got.data(), want.data(), want.size() * sizeof(float))) {
              fprintf(stderr, "format %d, %ld rows, D %ld, F %ld: other bits with instructions %d\n", format, static_cast<long>(num),
                      static_cast<long>(d), static_cast<long>(f), static_cast<int>(isa));
              return 1;
            }
          }
        }
  puts("kernels: the same bits with all instructions");
}
