#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds it in its own intrinsics (its bug 105593)
#include "avx512.inl"

namespace trinity {
namespace {

using BrainFormat = FloatFormat;  // tiles.inl names them
using ByteFormat = FloatFormat;

}  // namespace
}  // namespace trinity

#pragma GCC diagnostic ignored "-Wunused-function"  // what tiles.inl has for the other formats
#include "tiles.inl"
#include "kept.inl"

namespace trinity {
const KeptTable kKeptAvx512 = {multiply_rounded_as<FloatFormat>, forward_and_keep_as<FloatFormat>};
}  // namespace trinity
