// Top-k, as every tier runs it: ids and scores of the k best keys of each query, over one or more segments.
//   score and ties: scores.cuh; candidates: candidates.cuh; last step: merge.cuh.
// A block keeps a list of candidates per query in global memory (L2): what may still be among the best k, with some
// room. A full list drops what k others certainly beat, which raises the query's threshold; blocks of other splits see
// it. One more kernel merges the splits' lists and rescores about k candidates per query. Keys with near-equal scores,
// of which a list cannot hold all, are rescored at once: no query is ever redone. Nothing but k bounds the lists, so
// every k takes this way. Exact whatever the cuts and the order in which blocks run. Tiers differ in how they screen.
#pragma once
#include <algorithm>
#include <vector>

#include "candidates.cuh"
#include "screen_sm80.cuh"

namespace fastcompat::cuda {

struct TopkProblem {
  Candidates lists;      // [queries, splits, capacity]
  int* counts;           // [queries, splits]
  uint32_t* thresholds;  // [queries] order_of what k keys of some split reach
  int splits, capacity, k;
  TopkFilter filter;
  Gallery gallery;
};

// Entries of a list: the k best; room for half as many others, or a tile's, so that a list is shortened rarely; and one
// tile of keys, which may all come before anyone looks at its length again.
inline int64_t capacity_for(int64_t k) { return k + std::max<int64_t>(k / 2, TILE) + TILE; }

struct TopkTier {
  bool gathers;                                      // reads rows wherever they lie: listed ones, and ones that overlap
  int blocks_a_processor;                            // at once
  int (*rows_a_block)(const std::vector<Segment>&);  // queries
  void (*screen)(const sm80::Screen&, const TopkProblem&, const Launch&);
};

// The bytes of scratch where `runs` is false.
size_t run_topk(const TopkTier& tier, const std::vector<Segment>& segments, int64_t k, Metric metric,
                const TopkFilter& filter, float* scores, int64_t* ids, const Launch& launch, bool runs);

// What a block knows of a query's list.
struct alignas(16) ListState {
  float threshold;  // what k keys reach; -inf while that is not known
  int count;
  int64_t last_id;  // a tie with the threshold needs a smaller id than this, or NO_ID: not known

  __device__ void raise(float reached, int64_t id) {
    if (!(reached > threshold || id != NO_ID)) return;
    threshold = reached;
    last_id = id;
  }
};

// What blocks of any split know of a query.
__device__ __forceinline__ float shared_threshold(const TopkProblem& p, int64_t query) {
  return value_of(atomicMax(p.thresholds + query, 0u));
}

// Puts a key onto a query's list unless it is not wanted; returns the list's length then, or 0.
__device__ __forceinline__ int append(const TopkProblem& p, const Space& space, int64_t query, int64_t list,
                                      ListState& state, int64_t position, float low, float high) {
  if (!(high >= state.threshold)) return 0;
  const int64_t id = space.row(position);
  if (low == high && low == state.threshold && state.last_id != NO_ID && id > state.last_id) return 0;
  const TopkFilter& f = p.filter;
  if (f.exclude && f.exclude[query] == id) return 0;
  if (f.query_labels && f.query_labels[query] >= 0 && f.query_labels[query] == f.key_labels[id]) return 0;
  const int at = atomicAdd(&state.count, 1);
  const Candidates to = p.lists.at(list * p.capacity + at);
  *to.low = low;
  *to.high = high;
  *to.position = static_cast<uint32_t>(space.start + position);
  return at + 1;
}

constexpr int kRefresh = 16;  // tiles between two looks at what other splits have reached
constexpr int HELD = 12;      // candidates that a lane holds in registers: lists of up to 384, all of k <= 128

// A warp drops what k others certainly beat; leaves all where more than `room` would stay. k < n <= 32 * HELD.
__device__ __forceinline__ bool drop_beaten(const Candidates& list, int& n, int k, int room, float& threshold) {
  const WarpTeam team;
  uint32_t low[HELD], position[HELD];
  float high[HELD];
#pragma unroll
  for (int m = 0; m < HELD; ++m) {
    const int i = 32 * m + team.rank;
    low[m] = i < n ? order_of(list.low[i]) : 0;
    high[m] = i < n ? list.high[i] : -CUDART_INF_F;
    position[m] = i < n ? list.position[i] : 0;
  }
  uint32_t bound = 0, least = ~0u;  // as in kth_largest
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    int count = 0;
#pragma unroll
    for (int m = 0; m < HELD; ++m) count += low[m] >= (bound | bit);
    count = team.sum(count);
    if (count >= k) bound |= bit;
    if (count == k) break;
  }
#pragma unroll
  for (int m = 0; m < HELD; ++m) least = low[m] >= bound ? min(least, low[m]) : least;
  const float reached = fmaxf(threshold, value_of(team.least(least)));
  unsigned keeping = 0;  // bit m
#pragma unroll
  for (int m = 0; m < HELD; ++m) keeping |= static_cast<unsigned>(32 * m + team.rank < n && high[m] >= reached) << m;
  const int live = team.sum(__popc(keeping));
  if (live > room) return false;
  threshold = reached;
  n = 0;
#pragma unroll
  for (int m = 0; m < HELD; ++m) {
    int total;
    const int at = n + team.offset(keeping >> m & 1, total);
    if (keeping >> m & 1) {
      list.low[at] = value_of(low[m]);
      list.high[at] = high[m];
      list.position[at] = position[m];
    }
    n += total;
  }
  team.sync();
  return true;
}

// A warp makes room on a list that is longer than k. `staged` holds its length in words of faster memory, or is null.
__device__ __forceinline__ void shorten(const TopkProblem& p, int64_t query, int64_t list, uint32_t* shared_threshold,
                                        ListState& state, uint32_t* staged) {
  const Candidates candidates = p.lists.at(list * p.capacity);
  const int room = p.k + (p.capacity - TILE - p.k) / 2;  // half of what a list has beyond k, so that it lasts a while
  Cut cut = {state.count, state.threshold, NO_ID};
  if (cut.n > 32 * HELD || !drop_beaten(candidates, cut.n, p.k, room, cut.threshold))
    cut = keep_best(WarpTeam(), p.gallery, query, candidates, cut.n, p.k, room, false, cut.threshold, staged);
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    state.count = cut.n;
    state.raise(cut.threshold, cut.last_id);
    atomicMax(shared_threshold, order_of(cut.threshold));
  }
  __syncwarp();
}

}  // namespace fastcompat::cuda
