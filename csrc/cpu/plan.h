// How a call is cut into items. Where sums are split, the cuts depend on the sizes alone, never on the threads at hand,
// and partial results are combined in order: the same bits on every machine of an instruction set, with any thread
// count.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastcompat {

constexpr int64_t kItems = 64;                 // items that keep many cores busy
constexpr int64_t kPartialBytes = 16ll << 20;  // memory for partial results
constexpr int64_t kPanelBytes = 1ll << 20;     // packed lanes and their sums in one item
constexpr double kSerialWork = 4e6;            // products below which a second thread costs more than it gives

constexpr int64_t kStep = 32;  // a multiple of every instruction set's strip

// Lanes of an item: blocks of equal size, of at most `most_lanes`, since a packed row is used once a lane.
inline int64_t block_of(int64_t lanes, int64_t lane_bytes, int64_t most_lanes = 512) {
  const int64_t fits = std::min(most_lanes, kPanelBytes / std::max<int64_t>(1, lane_bytes));
  const int64_t most = std::max(fits, kStep) / kStep * kStep;
  const int64_t blocks = std::max<int64_t>(1, (lanes + most - 1) / most);
  return std::max(kStep, ((lanes + blocks - 1) / blocks + kStep - 1) / kStep * kStep);
}

struct Plan {
  int64_t block, blocks;  // lanes of an item, and how many such blocks
  int64_t rows, splits;   // streamed rows of an item, and how many such parts

  Plan(int64_t lanes, int64_t streamed, int64_t lane_block, int64_t bytes_per_split, int64_t smallest_part,
       int64_t items = kItems)
      : block(lane_block), blocks((lanes + block - 1) / block) {
    const int64_t wanted = blocks ? (items + blocks - 1) / blocks : 1;
    const int64_t affordable = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, bytes_per_split));
    const int64_t useful = std::max<int64_t>(1, streamed / smallest_part);
    const int64_t parts = std::min({wanted, affordable, useful});
    rows = std::max<int64_t>(1, (streamed + parts - 1) / parts);
    splits = std::max<int64_t>(1, (streamed + rows - 1) / rows);
  }
  int64_t items() const { return blocks * splits; }
};

inline int threads_for(int threads, double lanes, double streamed, double dim) {
  return lanes * streamed * dim < kSerialWork ? 1 : threads;
}

}  // namespace fastcompat
