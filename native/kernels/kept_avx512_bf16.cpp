#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds it in its own intrinsics (its bug 105593)
#include "avx512.inl"

namespace trinity {
namespace {

struct BrainFormat : BrainLanes {
  static Sum add(Sum s, Weight w, Row x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(w), "v"(x));  // see avx512_bf16.cpp
    return s;
  }
};

using ByteFormat = FloatFormat;  // tiles.inl names it

}  // namespace
}  // namespace trinity

#pragma GCC diagnostic ignored "-Wunused-function"  // what tiles.inl has for the other formats
#include "tiles.inl"
#include "kept.inl"

namespace trinity {
const KeptTable kKeptAvx512Bf16 = {multiply_rounded_as<BrainFormat>, forward_and_keep_as<BrainFormat>};
}  // namespace trinity
