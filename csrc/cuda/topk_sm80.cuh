// Top-k on sm_80 and newer: ids and scores of the k best keys of each query, over one or more segments.
//   score and ties: scores.cuh; screening: screen_sm80.cuh; lists: candidates.cuh.
// A block keeps a list of candidates per query in global memory (L2): what may still be among the best k, with room for
// two more tiles. A full list drops what k others certainly beat, which raises the query's threshold; blocks of other
// splits see it. One more kernel merges the splits' lists and rescores about k candidates per query. Keys with
// near-equal scores, of which a list cannot hold all, are rescored at once: no query is ever redone. Nothing but k
// bounds the lists, so every k takes this way. Exact whatever the cuts and the order in which blocks run.
#pragma once
#include "candidates.cuh"
#include "screen_sm80.cuh"

namespace fastcompat::cuda::sm80 {

struct TopkProblem {
  Candidates lists;      // [queries, splits, capacity]
  int* counts;           // [queries, splits]
  uint32_t* thresholds;  // [queries] order_of what k keys of some split reach
  int splits, capacity, k;
  TopkFilter filter;
  Gallery gallery;
};

inline int capacity_for(int64_t k) { return static_cast<int>(k + std::max<int64_t>(k / 2, TILE) + TILE); }

struct Topk {
  using Problem = TopkProblem;
  static constexpr bool settles = false;
  static constexpr size_t shared_bytes = TILE * (sizeof(float) + sizeof(int) + sizeof(int64_t));
  static constexpr int STAGED = STASHED * THREADS / (THREADS / 32);  // words of the stash per warp

  const TopkProblem& p;
  const Shared& shared;
  const int64_t first_query, queries;
  const int split;
  const int tid = threadIdx.x;
  const Space& space;
  float* thresholds;  // [TILE]
  int* count;         // [TILE]
  int64_t* last_id;   // [TILE] a tie with the threshold needs a smaller id
  bool full = false;
  unsigned tiles = 0;

  __device__ Topk(const TopkProblem& p, const Screen& screen, const Shared& shared, int64_t first_query, int split)
      : p(p),
        shared(shared),
        first_query(first_query),
        queries(screen.end_query - first_query),
        split(split),
        space(screen.space),
        local(first_query - screen.first_query) {
    last_id = reinterpret_cast<int64_t*>(shared.rest);
    thresholds = reinterpret_cast<float*>(last_id + TILE);
    count = reinterpret_cast<int*>(thresholds + TILE);
    thresholds[tid] = -CUDART_INF_F;
    count[tid] = tid < queries ? p.counts[list_of(tid)] : 0;
    last_id[tid] = NO_ID;
  }

  __device__ int64_t list_of(int row) const { return (local + row) * p.splits + split; }

  __device__ bool active() const { return true; }
  __device__ float threshold() const { return thresholds[tid]; }

  __device__ void start_tile(int64_t, int64_t) {
    if (tiles++ % 16 || tid >= queries) return;
    const float seen = value_of(atomicMax(p.thresholds + local + tid, 0u));
    if (seen <= thresholds[tid]) return;
    thresholds[tid] = seen;
    last_id[tid] = NO_ID;
  }

  __device__ bool offer(int row, int, int64_t position, float low, float high) {
    if (!(high >= thresholds[row])) return false;
    const int64_t query = first_query + row, id = space.row(position);
    if (low == high && low == thresholds[row] && last_id[row] != NO_ID && id > last_id[row]) return false;
    const TopkFilter& f = p.filter;
    if (f.exclude && f.exclude[query] == id) return false;
    if (f.query_labels && f.query_labels[query] >= 0 && f.query_labels[query] == f.key_labels[id]) return false;
    const int at = atomicAdd(count + row, 1);
    const Candidates to = p.lists.at(list_of(row) * p.capacity + at);
    *to.low = low;
    *to.high = high;
    *to.position = static_cast<uint32_t>(space.start + position);
    full |= at + 1 > p.capacity - TILE;
    return false;
  }
  __device__ void settle(int, int, int64_t, float) {}

  // Each warp shortens the lists of its rows that are longer than `longest`.
  __device__ void shorten(int longest) {
    const int warp = tid / 32;
    uint32_t* staged = reinterpret_cast<uint32_t*>(shared.stash) + warp * STAGED;
    for (int row = warp * 32; row < warp * 32 + 32; ++row) {
      const int n = count[row];
      if (n <= longest) continue;
      const Kept kept =
          keep_best(WarpTeam(), p.gallery, first_query + row, p.lists.at(list_of(row) * p.capacity), n, p.k,
                    p.k + (p.capacity - TILE - p.k) / 2, false, thresholds[row], n <= STAGED ? staged : nullptr);
      if (tid % 32 == 0) {
        count[row] = kept.n;
        if (kept.threshold > thresholds[row] || kept.last_id != NO_ID) {
          thresholds[row] = kept.threshold;
          last_id[row] = kept.last_id;
        }
        atomicMax(p.thresholds + local + row, order_of(kept.threshold));
      }
      __syncwarp();
    }
  }

  __device__ void end_tile() {
    if (!__syncthreads_or(full)) return;
    full = false;
    shorten(p.capacity - TILE);
    __syncthreads();
  }

  __device__ void finish() {
    shorten(p.k);
    __syncthreads();
    if (tid < queries) p.counts[list_of(tid)] = count[tid];
  }

 private:
  const int64_t local;
};

}  // namespace fastcompat::cuda::sm80
