// Into how many splits the streamed side of a walk is cut. A split is a block's share of the tiles; splits of the same
// rows are combined afterwards, in their order. The answer follows from shapes and the device alone, as the bits of the
// results do.
#pragma once
#include <algorithm>

#include "device.h"

namespace fastcompat::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

struct SplitCosts {
  int64_t blocks_a_processor = 1;         // that run at once
  int64_t overhead = 1;                   // tiles that a block's start and end are worth
  int64_t least_tiles = 1;                // of a split
  int64_t most_tiles = int64_t{1} << 30;  // of a split
  int64_t result_bytes = 0;               // of a split, which the combining pass reads again
};

struct Splits {
  int64_t count, tiles;  // tiles of each, but for the last
};

// The splits that end first when each of the GPU's slots takes one block after the other: waves of blocks, each as long
// as a split and its overhead, and the traffic of the splits' results. More than four waves are not considered.
inline Splits choose_splits(int64_t blocks, int64_t tiles, int device, const SplitCosts& costs) {
  constexpr int64_t kMostWaves = 4;
  constexpr int64_t kTileBytes = 8 << 20;  // what memory moves while a tile is computed
  const int64_t slots = costs.blocks_a_processor * device_attribute(cudaDevAttrMultiProcessorCount, device);
  blocks = std::max<int64_t>(blocks, 1);
  const int64_t least = std::max<int64_t>(1, ceil_div(tiles, costs.most_tiles));
  const int64_t most = std::max(least, std::min(tiles / costs.least_tiles, kMostWaves * slots / blocks));
  Splits best = {1, 1};
  int64_t best_cost = INT64_MAX;
  for (int64_t wanted = least; wanted <= most; ++wanted) {
    const int64_t each = std::max<int64_t>(1, ceil_div(tiles, wanted));
    const int64_t count = std::max<int64_t>(1, ceil_div(tiles, each));
    const int64_t results = count > 1 ? 2 * count * costs.result_bytes / kTileBytes : 0;
    const int64_t cost = ceil_div(blocks * count, slots) * (each + costs.overhead) + results;
    if (cost >= best_cost) continue;
    best_cost = cost;
    best = {count, each};
  }
  return best;
}

}  // namespace fastcompat::cuda
