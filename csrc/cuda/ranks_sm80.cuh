// Beat-counts on sm_80 and newer: how many keys beat each target of a query, in every block of the walk, in one pass.
//   out[i, p, t] = #{ m in [bounds[t], bounds[t+1]) : rank_code(s_im, row of m) > rank_code(threshold_ip, id_ip) }
// A query's targets are sorted first, so that a pair takes one binary search and one count instead of P comparisons,
// and pairs below the lowest target none; sums over the sorted targets at the end make the counts of each. Integer
// atomics only. float32 is screened with two bf16 terms, whose interval seldom holds a target; a pair whose interval
// does is settled with its exact score. Pair scores are score_of itself.
#pragma once
#include "screen_sm80.cuh"

namespace fastcompat::cuda::sm80 {

constexpr code_t NEVER_BEATEN = ~0ull;

struct BeatsProblem {
  const int64_t* bounds;  // [blocks + 1]
  int64_t blocks;
  const code_t* codes;  // [B, P] of the targets, ascending; padding is last
  const int* targets;   // [B, P] which target that is
  int64_t n_targets;
  const int64_t* exclude;   // [B] or null
  unsigned long long* out;  // [B, P, blocks]
};

// How many of n ascending values are below x (or up to x, with `up_to`).
template <class T>
__device__ __forceinline__ int64_t count_below(const T* values, int64_t n, T x, bool up_to = false) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = low + (n - low) / 2;
    if (values[middle] < x || (up_to && values[middle] == x))
      low = middle + 1;
    else
      n = middle;
  }
  return low;
}

struct Beats {
  using Problem = BeatsProblem;
  static constexpr bool resolves = true;
  static constexpr size_t shared_bytes = TILE * sizeof(int64_t);

  const BeatsProblem& p;
  const Space& space;
  const int64_t first_query;
  int64_t* block;  // [TILE] of the tile's keys; -1: outside the walk
  code_t lowest;   // of the row of this thread's number
  const int tid = threadIdx.x;

  __device__ Beats(const BeatsProblem& p, const Screen& screen, const Shared& shared, int64_t first_query, int)
      : p(p), space(screen.space), first_query(first_query), block(reinterpret_cast<int64_t*>(shared.rest)) {
    lowest = first_query + tid < screen.end_query ? p.codes[(first_query + tid) * p.n_targets] : NEVER_BEATEN;
  }

  __device__ bool active() const { return lowest != NEVER_BEATEN; }
  __device__ float threshold() const { return score_of_code(lowest); }

  __device__ void start_tile(int64_t first, int64_t) {
    const int64_t t = count_below(p.bounds, p.blocks + 1, first + tid, true) - 1;
    block[tid] = t < p.blocks ? t : -1;
  }

  __device__ bool offer(int row, int column, int64_t position, float low, float high) {
    const int64_t query = first_query + row;
    if (block[column] < 0 || (p.exclude && p.exclude[query] == space.row(position))) return false;
    const code_t* codes = p.codes + query * p.n_targets;
    const int64_t surely = count_below(codes, p.n_targets, static_cast<code_t>(order_of(low)) << 32);
    if (surely < p.n_targets && codes[surely] >> 32 <= order_of(high)) return true;
    count(query, surely, block[column]);
    return false;
  }

  __device__ void resolve(int row, int column, int64_t position, float score) {
    if (tid % 32 || !(score == score)) return;
    const int64_t query = first_query + row;
    count(query, count_below(p.codes + query * p.n_targets, p.n_targets, rank_code(score, space.row(position))),
          block[column]);
  }

  __device__ void end_tile() { __syncthreads(); }
  __device__ void finish() {}

 private:
  __device__ void count(int64_t query, int64_t beaten, int64_t t) {
    if (beaten)
      atomicAdd(p.out + (query * p.n_targets + p.targets[query * p.n_targets + beaten - 1]) * p.blocks + t, 1ull);
  }
};

// Sorts each query's targets: a target's place is how many come before it.
// report: sort_targets_kernel 36 registers
__global__ void __launch_bounds__(THREADS)
    sort_targets_kernel(const float* thresholds, const int64_t* ids, int64_t n_targets, int chunks, code_t* codes,
                        int* targets) {
  const int64_t first = blockIdx.x / chunks * n_targets,
                mine = blockIdx.x % chunks * static_cast<int64_t>(THREADS) + threadIdx.x;
  if (mine >= n_targets) return;
  auto code_of = [&](int64_t p) {
    const float threshold = __fadd_rn(thresholds[first + p], 0.0f);  // -0 is 0
    return ids[first + p] < 0 || !(threshold == threshold) ? NEVER_BEATEN : rank_code(threshold, ids[first + p]);
  };
  const code_t code = code_of(mine);
  int64_t place = first;
  for (int64_t p = 0; p < n_targets; ++p) {
    const code_t other = code_of(p);
    place += other < code || (other == code && p < mine);
  }
  codes[place] = code;
  targets[place] = static_cast<int>(mine);
}

// A pair was counted for the highest target it beats: it beats the lower ones as well. One thread per query and block.
// report: sum_targets_kernel 26 registers
__global__ void __launch_bounds__(THREADS)
    sum_targets_kernel(const int* targets, int64_t n_targets, int64_t blocks, int64_t pairs, unsigned long long* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= pairs) return;
  const int64_t first = at / blocks * n_targets, t = at % blocks;
  unsigned long long sum = 0;
  for (int64_t place = n_targets - 1; place >= 0; --place) {
    unsigned long long& entry = out[(first + targets[first + place]) * blocks + t];
    entry = sum += entry;
  }
}

struct PairProblem {
  Segment segment;
  Metric metric;
  const int64_t* ids;  // [B, P]
  int64_t n_targets;
  float* out;    // [B, P]
  code_t* flag;  // the smallest nonfinite_code
};

constexpr code_t BAD_QUERY = nonfinite_code(0, false, 0), BAD_KEY = nonfinite_code(0, true, 0);

// One warp per pair. An id past the keys gives NaN. Floor: two rows read per pair.
// report: pair_kernel 52 registers; LDG.E.128*
__global__ void __launch_bounds__(THREADS) pair_kernel(const __grid_constant__ PairProblem p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  if (at >= p.segment.query.rows * max(p.n_targets, static_cast<int64_t>(1))) return;
  const int64_t query = at / max(p.n_targets, static_cast<int64_t>(1));
  const bool first = threadIdx.x % 32 == 0;
  double wide;
  RowFactors q = {}, k = {};
  float square = squared_norm(p.segment.query, query, wide);
  set_factors(p.metric, false, square, wide, q);
  if (first && !is_finite(wide)) atomicMin(p.flag, BAD_QUERY + query);
  if (!p.n_targets) return;
  const int64_t id = p.ids[at];
  float score = id < 0 ? -CUDART_INF_F : CUDART_NAN_F;
  if (id >= 0 && id < p.segment.keys.rows) {
    square = squared_norm(p.segment.keys, id, wide);
    set_factors(p.metric, true, square, wide, k);
    if (first && !is_finite(wide)) atomicMin(p.flag, BAD_KEY + id);
    const Space space = {p.segment, p.metric, 0, nullptr, nullptr, nullptr};
    score = score_of(space, query, q, id, k);
  }
  if (first) p.out[at] = score;
}

}  // namespace fastcompat::cuda::sm80
