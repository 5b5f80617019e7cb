// Keeps the best k of n candidates (score down, then id up) in their order: bisects the k-th best score, counting with
// vectors, instead of moving elements about.
#pragma once
#include "tile.inl"

namespace {

// How many scores are above `limit`. Room for W more scores is read and must hold -inf.
inline int64_t count_above(const float* scores, int64_t n, float limit) {
  const F bar = Simd::set1(limit);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += W) count += __builtin_popcount(Simd::bits(Simd::gt(Simd::load(scores + i), bar)));
  return count;
}

inline float least_of(const float* x, int64_t n) {
  F least = Simd::set1(x[0]);
  int64_t i = 0;
  for (; i + W <= n; i += W) least = Simd::min(least, Simd::load(x + i));
  float lanes[W];
  Simd::store(lanes, least);
  for (; i < n; ++i) lanes[0] = smaller(lanes[0], x[i]);
  for (int lane = 1; lane < W; ++lane) lanes[0] = smaller(lanes[0], lanes[lane]);
  return lanes[0];
}

// Room for W more is read and must hold -inf.
inline float most_of(const float* x, int64_t n) {
  F most = Simd::load(x);
  for (int64_t i = W; i < n; i += W) most = Simd::max(most, Simd::load(x + i));
  float lanes[W];
  Simd::store(lanes, most);
  for (int lane = 1; lane < W; ++lane) lanes[0] = lanes[0] < lanes[lane] ? lanes[lane] : lanes[0];
  return lanes[0];
}

// The largest id that a tie at `score` may have if `room` ties stay.
inline int32_t last_tie(const float* scores, const int32_t* ids, int64_t n, float score, int64_t room) {
  int64_t low = -1, high = 0x7fffffff;  // at most `low`: too few; at most `high`: enough
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += scores[i] == score && ids[i] <= middle;
    (count >= room ? high : low) = middle;
  }
  return static_cast<int32_t>(high);
}

// Where the best k of n end: exactly k are above the value, or (not `above`) the value is the k-th best score.
struct Cut {
  float value;
  bool above;
};

// 1 <= k < n, no NaN. Scores have room for W more.
inline Cut kth_best(float* scores, int64_t n, int64_t k) {
  for (int64_t i = n; i < n + W; ++i) scores[i] = -kInf;
  // Fewer than k are above `high`, at least k are above `low`.
  int64_t low = static_cast<int64_t>(order_of(least_of(scores, n))) - 1, high = order_of(most_of(scores, n)),
          above = -1;
  while (high - low > 1 && above != k) {
    const int64_t middle = low + (high - low) / 2;
    above = count_above(scores, n, value_of(static_cast<int32_t>(middle)));
    (above >= k ? low : high) = middle;
  }
  const float value = value_of(static_cast<int32_t>(above == k ? low : high));
  return {value, above == k};
}

// Returns the k-th best score.
inline float keep_best(float* scores, int32_t* ids, int64_t n, int64_t k) {
  const Cut cut = kth_best(scores, n, k);
  const int32_t tie = cut.above ? -1 : last_tie(scores, ids, n, cut.value, k - count_above(scores, n, cut.value));
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i];
    const int32_t id = ids[i];
    scores[count] = score;
    ids[count] = id;
    count += score > cut.value || (score == cut.value && id <= tie);
  }
  return cut.above ? least_of(scores, k) : cut.value;
}

}  // namespace
