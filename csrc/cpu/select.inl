// Keeps the best k of n candidates (score down, then id up) in their order: bisects the k-th best score, counting with
// vectors, instead of moving elements about.

namespace {

// Floats in their order as integers, and back.
inline int32_t order_of(float x) {
  const int32_t u = static_cast<int32_t>(bits_of_float(x));
  return u < 0 ? static_cast<int32_t>(0x80000000u - static_cast<uint32_t>(u)) : u;
}

inline float float_of(int32_t order) {
  return float_from_bits(order < 0 ? 0x80000000u - static_cast<uint32_t>(order) : static_cast<uint32_t>(order));
}

// How many scores are above `limit`. Room for W more scores is read and must hold -inf.
inline int64_t count_above(const float* scores, int64_t n, float limit) {
  const F bar = Simd::set1(limit);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += W) count += __builtin_popcount(Simd::bits(Simd::gt(Simd::load(scores + i), bar)));
  return count;
}

// The largest id that a tie at `score` may have if `room` ties are kept.
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

// 1 <= k < n, no NaN. Returns the k-th best score. Scores have room for W more.
inline float keep_best(float* scores, int32_t* ids, int64_t n, int64_t k) {
  for (int64_t i = n; i < n + W; ++i) scores[i] = -kInf;
  float least = scores[0], most = scores[0];
  for (int64_t i = 1; i < n; ++i) {
    least = scores[i] < least ? scores[i] : least;
    most = scores[i] > most ? scores[i] : most;
  }
  // Fewer than k are above `high`, at least k are above `low`.
  int64_t low = static_cast<int64_t>(order_of(least)) - 1, high = order_of(most), above = -1;
  while (high - low > 1 && above != k) {
    const int64_t middle = low + (high - low) / 2;
    above = count_above(scores, n, float_of(static_cast<int32_t>(middle)));
    (above >= k ? low : high) = middle;
  }
  const bool exact = above == k;  // the k above the bar are the best; else the bar is the k-th best score
  const float bar = float_of(static_cast<int32_t>(exact ? low : high));
  const int32_t tie = exact ? -1 : last_tie(scores, ids, n, bar, k - count_above(scores, n, bar));
  int64_t kept = 0;
  float kth = kInf;
  for (int64_t i = 0; i < n; ++i) {
    const float score = scores[i];
    const int32_t id = ids[i];
    const bool keep = score > bar || (score == bar && id <= tie);
    scores[kept] = score;
    ids[kept] = id;
    kth = keep && score < kth ? score : kth;
    kept += keep;
  }
  return kth;
}

}  // namespace
