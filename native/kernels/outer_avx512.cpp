#include "outer.inl"

namespace trinity {
const OuterTable kOuterAvx512 = {add_products_as<Floats>, add_row_sums_as<Floats>};
}  // namespace trinity
