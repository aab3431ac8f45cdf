// Kernels of this extension for rings.
#pragma once
#include "expert_call.h"

namespace trinity {

// Experts whose stacks are gate, up and down in that format of kernels.h; null where there is none.
ExpertKernel experts_in(uint32_t format);

}  // namespace trinity
