// How a call is cut into items. The cuts depend on the sizes and the instruction set alone, never on the threads at
// hand, and partial results are combined in order: the same bits on every machine of an instruction set, with any
// thread count.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastcompat {

constexpr int64_t kItems = 64;                 // items that keep many cores busy
constexpr int64_t kPartialBytes = 32ll << 20;  // memory for partial results
constexpr double kSerialWork = 4e6;            // products below which a second thread costs more than it gives

struct Plan {
  int64_t block, blocks;  // lanes of an item, and how many such blocks
  int64_t rows, splits;   // streamed rows of an item, and how many such parts

  Plan(int64_t lanes, int64_t streamed, int64_t block_lanes, int64_t bytes_per_split, int64_t smallest_part)
      : block(block_lanes), blocks((lanes + block_lanes - 1) / block_lanes) {
    const int64_t wanted = blocks ? (kItems + blocks - 1) / blocks : 1;
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
