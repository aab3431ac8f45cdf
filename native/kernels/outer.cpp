// Which instructions are used: those that a format takes, or none.
#include "kept.h"
#include "outer.h"

namespace trinity {
namespace {

const OuterTable *table_of(Format format) {
#if defined(__x86_64__)
  if (format == kFloat32 && isa() >= Isa::avx512) return &kOuterAvx512;
  if (format == kBfloat16 && isa() >= Isa::avx512_bf16) return &kOuterAvx512Bf16;
#endif
  static_cast<void>(format);
  return nullptr;
}

const KeptTable *kept_table_of(Format format) {
#if defined(__x86_64__)
  if (table_of(format)) return format == kFloat32 ? &kKeptAvx512 : &kKeptAvx512Bf16;
#endif
  static_cast<void>(format);
  return nullptr;
}

}  // namespace

bool has_outer(Format format) { return table_of(format) != nullptr; }

void add_products(const AddedProducts &products, int64_t num_units, int64_t first, int64_t last) {
  if (const OuterTable *table = table_of(products.format)) table->add_products(products, num_units, first, last);
}

void add_row_sums(const RowSums &sums, int64_t num_units, int64_t first, int64_t last) {
  if (const OuterTable *table = table_of(sums.format)) table->add_row_sums(sums, num_units, first, last);
}

void multiply_rounded(const RoundedProduct &product, int64_t num_units, int64_t first, int64_t last) {
  if (const KeptTable *table = kept_table_of(product.format)) table->multiply_rounded(product, num_units, first, last);
}

void forward_and_keep(const KeptForward &kept, int64_t first, int64_t last) {
  if (const KeptTable *table = kept_table_of(kept.format)) table->forward_and_keep(kept, first, last);
}

}  // namespace trinity
