// The last step of top-k: one block merges the lists of a query, rescores, sorts and writes.
#pragma once
#include "candidates.cuh"

namespace fastcompat::cuda {

constexpr int MERGE_THREADS = 128, SORTED_IN_SMEM = 2048;

struct Merge {
  Candidates lists;   // [queries, splits, capacity]
  const int* counts;  // [queries, splits]
  int splits, capacity, k;
  int64_t wanted;  // >= k, the columns of the outputs
  int64_t first_query;
  float* scores;  // [B, wanted]
  int64_t* ids;
};

// Sorts m codes, greatest first: bitonic merges whose first step mirrors, so that any m will do.
template <class Team>
__device__ void sort_codes(const Team& team, code_t* codes, int m) {
  int whole = 1;
  while (whole < m) whole *= 2;
  for (int run = 2; run <= whole; run *= 2)
    for (int step = run / 2; step; step /= 2) {
      for (int i = team.rank; i < whole / 2; i += team.size) {
        const int a = i / step * 2 * step + i % step;
        const int b = step == run / 2 ? (i / step + 1) * 2 * step - 1 - i % step : a + step;
        if (b >= m) continue;
        const code_t x = codes[a], y = codes[b];
        if (x >= y) continue;
        codes[a] = y;
        codes[b] = x;
      }
      team.sync();
    }
}

// report: merge_kernel 48 registers; LDG.E.128*
__global__ void __launch_bounds__(MERGE_THREADS)
    merge_kernel(const __grid_constant__ Merge p, const __grid_constant__ Gallery gallery) {
  DYN_SMEM(smem);
  code_t* codes = reinterpret_cast<code_t*>(smem);  // [min(k, SORTED_IN_SMEM)], then the team's words
  const BlockTeam<MERGE_THREADS> team(codes + min(p.k, SORTED_IN_SMEM));
  const int64_t query = p.first_query + blockIdx.x, list = static_cast<int64_t>(blockIdx.x) * p.splits;
  const Candidates all = p.lists.at(list * p.capacity);
  int n = p.counts[list];
  for (int s = 1; s < p.splits; ++s)
    n += compact(team, all.at(static_cast<int64_t>(s) * p.capacity), p.counts[list + s], all.at(n),
                 [](int) { return true; });
  n = keep_best(team, gallery, query, all, n, p.k, 0, true, -CUDART_INF_F, nullptr).n;
  n = min(n, p.k);
  float* scores = p.scores + query * p.wanted;
  int64_t* ids = p.ids + query * p.wanted;
  if (p.k > SORTED_IN_SMEM) codes = reinterpret_cast<code_t*>(ids);
  for (int i = team.rank; i < n; i += team.size) codes[i] = rank_code(all.low[i], gallery.id(all.position[i]));
  team.sync();
  sort_codes(team, codes, n);
  for (int64_t i = team.rank; i < p.wanted; i += team.size) {
    const code_t code = i < n ? codes[i] : 0;
    scores[i] = i < n ? score_of_code(code) : -CUDART_INF_F;
    ids[i] = i < n ? id_of_code(code) : -1;
  }
}

inline void merge(const Merge& p, const Gallery& gallery, int64_t queries, void* stream) {
  const size_t smem = (min(p.k, SORTED_IN_SMEM) + MERGE_THREADS / 32) * sizeof(code_t);
  launch(merge_kernel, dim3(static_cast<unsigned>(queries)), dim3(MERGE_THREADS), smem, stream, p, gallery);
}

}  // namespace fastcompat::cuda
