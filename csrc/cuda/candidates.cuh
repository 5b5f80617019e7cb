// Candidates of a query: intervals that hold their exact scores. Nothing is decided by a screened score: a candidate
// goes only when k others are certainly better, and where intervals overlap too much to tell, they are rescored on the
// spot.
#pragma once
#include "scores.cuh"

namespace fastcompat::cuda {

constexpr int MAX_SEGMENTS = 16;
constexpr int64_t NO_ID = -1;

struct Gallery {
  int n;
  Space spaces[MAX_SEGMENTS];

  __device__ const Space& of(uint32_t position) const {
    int s = 0;
    while (s + 1 < n && position >= spaces[s + 1].start) ++s;
    return spaces[s];
  }
  __device__ int64_t id(uint32_t position) const {
    const Space& s = of(position);
    return s.row(position - s.start);
  }
};

struct Candidates {
  float *low, *high;   // equal once the exact score is known; -inf: not a candidate
  uint32_t* position;  // over all segments

  __host__ __device__ Candidates at(int64_t i) const { return {low + i, high + i, position + i}; }
};

// Threads that work on one list together.
struct WarpTeam {
  static constexpr int size = 32, warps = 1, warp = 0;
  const int rank = threadIdx.x % 32;

  __device__ void sync() const { __syncwarp(); }
  __device__ int sum(int x) const { return __reduce_add_sync(kAllLanes, x); }
  template <class Key>
  __device__ Key least(Key x) const {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, lanes));
    return x;
  }
  // How many threads before this one keep something, and how many do in all; orders what was read before.
  __device__ int offset(bool keep, int& total) const {
    const unsigned keeping = __ballot_sync(kAllLanes, keep);
    __syncwarp();
    total = __popc(keeping);
    return __popc(keeping & ((1u << rank) - 1));
  }
};

template <int THREADS>
struct BlockTeam {
  static constexpr int size = THREADS, warps = THREADS / 32;
  code_t* words;  // [warps], shared
  const int rank = threadIdx.x, warp = threadIdx.x / 32;

  __device__ explicit BlockTeam(void* shared) : words(static_cast<code_t*>(shared)) {}
  __device__ void sync() const { __syncthreads(); }
  __device__ int sum(int x) const {
    int total;
    total_of(__reduce_add_sync(kAllLanes, x), total);
    return total;
  }
  template <class Key>
  __device__ Key least(Key x) const {
    x = WarpTeam().least(x);
    __syncthreads();
    if (rank % 32 == 0) words[warp] = x;
    __syncthreads();
    for (int w = 0; w < warps; ++w) x = min(x, static_cast<Key>(words[w]));
    return x;
  }
  __device__ int offset(bool keep, int& total) const {
    const unsigned keeping = __ballot_sync(kAllLanes, keep);
    return total_of(__popc(keeping), total) + __popc(keeping & ((1u << rank % 32) - 1));
  }

 private:
  __device__ int total_of(int of_warp, int& total) const {  // returns the sum over the warps before this one
    __syncthreads();
    if (rank % 32 == 0) words[warp] = of_warp;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
      before += w < warp ? static_cast<int>(words[w]) : 0;
      total += static_cast<int>(words[w]);
    }
    return before;
  }
};

// The k-th largest of n keys, 1 <= k <= n: sets its bits from the top, counting, until a bound has exactly k above.
template <class Key, class Team, class KeyOf>
__device__ Key kth_largest(const Team& team, int n, int k, KeyOf key) {
  Key bound = 0;
  for (Key bit = Key(1) << (8 * sizeof(Key) - 1); bit; bit >>= 1) {
    int count = 0;
    for (int i = team.rank; i < n; i += team.size) count += key(i) >= (bound | bit);
    count = team.sum(count);
    if (count >= k) bound |= bit;
    if (count == k) break;
  }
  Key least = ~Key(0);
  for (int i = team.rank; i < n; i += team.size)
    if (key(i) >= bound) least = min(least, key(i));
  return team.least(least);
}

// Moves those of n candidates that are kept to the front of `to`, which may be the same list; returns how many.
template <class Team, class Keep>
__device__ int compact(const Team& team, const Candidates& from, int n, const Candidates& to, Keep keep) {
  int count = 0;
  for (int first = 0; first < n; first += team.size) {
    const int i = first + team.rank;
    const bool mine = i < n && keep(i);
    float low = 0, high = 0;
    uint32_t position = 0;
    if (mine) {
      low = from.low[i];
      high = from.high[i];
      position = from.position[i];
    }
    int total;
    const int at = count + team.offset(mine, total);
    if (mine) {
      to.low[at] = low;
      to.high[at] = high;
      to.position[at] = position;
    }
    count += total;
  }
  team.sync();
  return count;
}

struct Cut {
  int n;
  float threshold;  // k candidates of some list reach it; -inf while there are fewer
  int64_t last_id;  // a tie with the threshold needs a smaller id than this, or NO_ID: not known
};

// Drops candidates that k others certainly beat, and those that cannot reach `floor`. Leaves at most k, with exact
// scores, when `exactly` or when more than `room` would stay. `staged` holds n words of faster memory, or is null.
template <class Team>
__device__ Cut keep_best(const Team& team, const Gallery& gallery, int64_t query, const Candidates& list, int n, int k,
                         int room, bool exactly, float floor, uint32_t* staged) {
  Cut cut = {n, floor, NO_ID};
  if (n > k) {
    if (staged)
      for (int i = team.rank; i < n; i += team.size) staged[i] = order_of(list.low[i]);
    team.sync();
    cut.threshold = fmaxf(floor, value_of(kth_largest<uint32_t>(
                                     team, n, k, [&](int i) { return staged ? staged[i] : order_of(list.low[i]); })));
  }
  const float threshold = cut.threshold;
  int live = 0;
  for (int i = team.rank; i < n; i += team.size) live += list.high[i] >= threshold;
  live = team.sum(live);
  if (!exactly && live <= room) {
    if (live < n) cut.n = compact(team, list, n, list, [&](int i) { return list.high[i] >= threshold; });
    return cut;
  }
  for (int i = team.warp; i < n; i += team.warps) {
    const float high = list.high[i];
    const bool live_one = high >= threshold;
    if (live_one && list.low[i] == high) continue;
    float score = -CUDART_INF_F;
    if (live_one) {
      const uint32_t position = list.position[i];
      const Space& s = gallery.of(position);
      score = score_of(s, query, s.query_factors[query], s.row(position - s.start), s.key_factors[position - s.start]);
    }
    __syncwarp();
    if (team.rank % 32 == 0) list.low[i] = list.high[i] = score > -CUDART_INF_F ? score : -CUDART_INF_F;  // not NaN
  }
  team.sync();
  auto code = [&](int i) -> code_t {
    const float score = list.low[i];
    return score > -CUDART_INF_F ? rank_code(score, gallery.id(list.position[i])) : 0;
  };
  live = 0;
  for (int i = team.rank; i < n; i += team.size) live += list.low[i] > -CUDART_INF_F;
  live = team.sum(live);
  code_t last = 1;
  if (live >= k) {
    last = kth_largest<code_t>(team, n, k, code);
    cut.threshold = score_of_code(last);
    cut.last_id = id_of_code(last);
  }
  cut.n = compact(team, list, n, list, [&](int i) { return code(i) >= last; });
  return cut;
}

}  // namespace fastcompat::cuda
