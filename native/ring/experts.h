// Kernels of this extension for rings.
#pragma once
#include "expert_call.h"

namespace trinity {

// Experts in fp32, in the order of gate, up and down; null where the extension has no such kernel.
ExpertKernel experts_f32();

}  // namespace trinity
