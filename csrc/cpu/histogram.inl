// The thresholds of a query, ascending, cut its scores into intervals; counting how many scores fall into each gives
// all of its beat-counts. A score's interval is looked up: a rising map takes scores to bins in a table, and the map
// takes thresholds there by the same arithmetic, so a score in a bin that holds no threshold is on the side of every
// threshold that its bin is on. The few in a bin that does hold one are ambiguous: bisection finds their interval.
// Most scores of a query tend to fall into one interval, its main one: two comparisons tell.
#pragma once
#include "tile.inl"

namespace {

constexpr float kSteepest = 1e30f;                 // of a map, for thresholds that are equal or nearly so
constexpr int kMaxThresholds = (1 << 15) / L - 1;  // the table tells numbers of thresholds up to this one

// A lane's map from scores to bins: (score - low) * factor + origin, clamped to first .. last.
struct BinMap {
  float low[L], factor[L], origin[L], first[L], last[L];
  float main_low[L], main_high[L];  // scores between them are in the main interval
  int32_t main[L];                  // thresholds below it

  // Never an infinity times zero: NaN alone gives NaN, which goes to the first bin, below all thresholds.
  I bin(F score, int v) const {
    const auto of = [&](const float* x) { return Simd::load(x + v * W); };
    const F at = Simd::fma(Simd::sub(score, of(low)), of(factor), of(origin));
    return Simd::truncate(Simd::min(Simd::max(at, of(first)), of(last)));
  }
};

// A score and its id as one number that is larger for the better of two; NaN beats nothing.
inline int64_t code_of(float score, int32_t id) { return score == score ? rank_code(score, id) : INT64_MIN; }

// The sizes that all strips of an item share.
struct HistogramSizes {
  // Of a lane. With more, fewer scores would be ambiguous, but the table would leave the first cache.
  static constexpr int bins = 256;
  int64_t targets;
  int32_t ambiguous;  // a power of two above every L * number of thresholds that the table tells

  explicit HistogramSizes(int64_t targets) : targets(targets), ambiguous(L) {
    while (ambiguous < (smaller<int64_t>(targets, kMaxThresholds) + 1) * L) ambiguous *= 2;
  }
  int64_t table_floats() const { return L * bins / 2; }
  int64_t counts() const { return targets * L < ambiguous ? 2 * ambiguous : (targets + 1) * L + ambiguous; }
};

struct StripHistogram : HistogramSizes {
  BinMap& map;
  const int64_t* thresholds;  // [lanes][targets], ascending rank codes; padding last
  int lanes;
  uint16_t* table;  // [L][bins]: L * how many thresholds are below the bin; with `ambiguous` where it holds some
  int32_t* counts;  // [intervals][L]; what is ambiguous is counted from `ambiguous` on until it is resolved

  int64_t real(int lane) const {
    int64_t n = lane < lanes ? targets : 0;
    while (n && thresholds[lane * targets + n - 1] == INT64_MAX) --n;
    return n;
  }
  float score(int lane, int64_t r) const {
    return value_of(static_cast<int32_t>(thresholds[lane * targets + r] >> 32));
  }

  void prepare() {
    int64_t count[L], most = 0;
    int next[L] = {};
    for (int lane = 0; lane < L; ++lane) {
      count[lane] = real(lane);
      most = most < count[lane] ? count[lane] : most;
      int64_t low = 0, high = count[lane] - 1;
      while (low < high && score(lane, low) == -kInf) ++low;
      while (low < high && score(lane, high) == kInf) --high;
      const double from = low <= high ? score(lane, low) : 0, to = low <= high ? score(lane, high) : 0;
      // Thresholds go to bins 1 .. bins - 3, scores beyond them to the first and to bins - 2.
      const double factor = (bins - 4) / (to - from);
      const bool finite = from - from == 0 && to - to == 0;
      map.low[lane] = finite ? static_cast<float>(from) : 0;
      map.factor[lane] = finite && factor < kSteepest ? static_cast<float>(factor) : kSteepest;
      map.first[lane] = static_cast<float>(lane * bins);
      map.last[lane] = static_cast<float>(lane * bins + bins - 2);  // the next one says where its thresholds end
      map.origin[lane] = static_cast<float>(lane * bins + 1);
      map.main[lane] = 0;
      map.main_low[lane] = kInf;  // none yet
      map.main_high[lane] = -kInf;
    }
    const auto fill = [&](int lane, int to, int64_t below) {
      const int64_t entry = below > kMaxThresholds ? kMaxThresholds * L + ambiguous : below * L;
      while (next[lane] < to) table[lane * bins + next[lane]++] = static_cast<uint16_t>(entry);
    };
    for (int64_t r = 0; r < most; ++r) {
      float limits[L];
      int32_t at[L];
      for (int lane = 0; lane < L; ++lane) limits[lane] = r < count[lane] ? score(lane, r) : 0;
      for (int v = 0; v < NV; ++v) Simd::store(at + v * W, map.bin(Simd::load(limits + v * W), v));
      for (int lane = 0; lane < L; ++lane) {
        if (r >= count[lane]) continue;
        fill(lane, at[lane] - lane * bins + 1, r);
        table[at[lane]] |= static_cast<uint16_t>(ambiguous);
      }
    }
    for (int lane = 0; lane < L; ++lane) fill(lane, bins, count[lane]);
  }

  // Makes the interval with most scores so far the main one.
  void choose_main() const {
    for (int lane = 0; lane < L; ++lane) {
      const int64_t count = real(lane);
      int64_t most = 0;
      for (int64_t r = 1; r <= count; ++r)
        if (counts[r * L + lane] > counts[most * L + lane]) most = r;
      map.main[lane] = static_cast<int32_t>(most);
      map.main_low[lane] = most > 0 ? score(lane, most - 1) : -kInf;
      map.main_high[lane] = most < count ? score(lane, most) : kInf;
    }
  }

  // Whether the scores of a row, known by bounds, are all in their main intervals.
  bool all_main(const F (&low)[NV], const F (&high)[NV]) const {
    uint32_t all = (1u << W) - 1;
    for (int v = 0; v < NV; ++v)
      all &= Simd::bits(Simd::gt(low[v], Simd::load(map.main_low + v * W))) &
             Simd::bits(Simd::gt(Simd::load(map.main_high + v * W), high[v]));
    return all == (1u << W) - 1;
  }

  // Counts that many rows of which all scores are in their main intervals.
  void count_main(int rows) const {
    for (int lane = 0; lane < L; ++lane) counts[map.main[lane] * L + lane] += rows;
  }

  // How many thresholds are below this rank code, which falls to a bin from `low` to `high`.
  int64_t below(int lane, int32_t low, int32_t high, int64_t code) const {
    const int64_t least = (table[low] & (ambiguous - 1)) / L, most = (table[high + 1] & (ambiguous - 1)) / L;
    const int64_t* from = thresholds + lane * targets + least;
    for (int64_t n = (most < kMaxThresholds ? most : targets) - least; n > 0;) {
      const int64_t half = (n + 1) / 2;
      from += half & -static_cast<int64_t>(from[half - 1] < code);
      n -= half;
    }
    return from - (thresholds + lane * targets);
  }

  // Counts n rows of scores by the lowest and the highest bin [n][L] that a score may be in; lists those that are
  // ambiguous. One bin (not TWO): low is high. `unresolved` has room for one more.
  template <bool TWO>
  int count(int n, const int32_t* low, const int32_t* high, int32_t* unresolved) const {
    int n_unresolved = 0;
    for (int i = 0; i < n; ++i) {
      const int32_t *from = low + i * L, *to = high + i * L;
      uint32_t any = 0, differ = 0;
#pragma GCC unroll 32
      for (int lane = 0; lane < L; ++lane) {
        const uint32_t entry = table[to[lane]];
        ++counts[entry + lane];
        any |= entry;
        if (TWO) differ |= entry ^ table[from[lane]];
      }
      if (differ | (any & ambiguous))
        for (int lane = 0; lane < L; ++lane) {
          const uint32_t entry = table[to[lane]];
          unresolved[n_unresolved] = i * L + lane;
          n_unresolved += ((entry ^ table[from[lane]]) | (entry & ambiguous)) != 0;
        }
    }
    return n_unresolved;
  }

  // Counts what was ambiguous where it belongs.
  void recount(int lane, int32_t low, int32_t high, int64_t code) const {
    --counts[table[high] + lane];
    ++counts[below(lane, low, high, code) * L + lane];
  }
};

}  // namespace
