// Threads that share out one call's work: each takes the next few units, so that one that is held up leaves its share to the others.
#pragma once
#include <stdint.h>

#include <functional>

namespace trinity {

// work(first, last) over [0, num) on up to so many threads, this one among them; on this one alone if there is little to do.
// The others belong to the calling thread, have its priority, and end with it; what they do must not throw.
void in_threads(int threads, int64_t num, int64_t operations, const std::function<void(int64_t, int64_t)> &work);

}  // namespace trinity
