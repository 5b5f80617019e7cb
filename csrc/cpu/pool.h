// Threads: torch's own where it has loaded GNU OpenMP, else a small pool; a forked child builds a pool of its own.
// Items are handed out dynamically, and several Python threads may call at once.
#pragma once
#include <cstdint>
#include <functional>

#include "kernels.h"

namespace fastcompat {

// Runs fn(item, workspace) for every item in [0, items) on at most `threads` threads, the caller's included.
// Which thread runs an item never changes a result. The first exception is rethrown after all threads have left.
void parallel_for(int64_t items, int threads, const std::function<void(int64_t, Workspace&)>& fn);

}  // namespace fastcompat
