#include "outer.inl"

namespace trinity {
const OuterTable kOuterAvx512Bf16 = {add_products_as<Brains>, add_row_sums_as<Brains>};
}  // namespace trinity
