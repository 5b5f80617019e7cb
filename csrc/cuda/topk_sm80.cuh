// Top-k on sm_80 and newer: what a block of screen_sm80.cuh does with its survivors.
#pragma once
#include "topk.cuh"

namespace fastcompat::cuda::sm80 {

struct Topk {
  using Problem = TopkProblem;
  static constexpr bool resolves = false;
  static constexpr size_t shared_bytes = TILE * sizeof(ListState);
  static constexpr int STAGED = STASHED * THREADS / (THREADS / 32);  // words of the stash per warp

  const TopkProblem& p;
  const Shared& shared;
  const int64_t first_query, queries;
  const int split;
  const int tid = threadIdx.x;
  const Space& space;
  ListState* lists;  // [TILE]
  bool full = false;
  unsigned tiles = 0;

  __device__ Topk(const TopkProblem& p, const Screen& screen, const Shared& shared, int64_t first_query, int split)
      : p(p),
        shared(shared),
        first_query(first_query),
        queries(screen.end_query - first_query),
        split(split),
        space(screen.space),
        lists(reinterpret_cast<ListState*>(shared.rest)),
        local(first_query - screen.first_query) {
    lists[tid] = {-CUDART_INF_F, tid < queries ? p.counts[list_of(tid)] : 0, NO_ID};
  }

  __device__ int64_t list_of(int row) const { return (local + row) * p.splits + split; }

  __device__ bool active() const { return true; }
  __device__ float threshold() const { return lists[tid].threshold; }

  __device__ void start_tile(int64_t, int64_t) {
    if (tiles++ % kRefresh || tid >= queries) return;
    lists[tid].raise(shared_threshold(p, local + tid), NO_ID);
  }

  __device__ bool offer(int row, int, int64_t position, float low, float high) {
    const int n = append(p, space, first_query + row, list_of(row), lists[row], position, low, high);
    full |= n > p.capacity - TILE;
    return false;
  }
  __device__ void resolve(int, int, int64_t, float) {}

  // Each warp shortens the lists of its rows that are longer than `longest`.
  __device__ void shorten(int longest) {
    const int warp = tid / 32;
    uint32_t* staged = reinterpret_cast<uint32_t*>(shared.stash) + warp * STAGED;
    for (int row = warp * 32; row < warp * 32 + 32; ++row)
      if (lists[row].count > longest)
        cuda::shorten(p, first_query + row, list_of(row), p.thresholds + local + row, lists[row],
                      lists[row].count <= STAGED ? staged : nullptr);
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
    if (tid < queries) p.counts[list_of(tid)] = lists[tid].count;
  }

 private:
  const int64_t local;
};

}  // namespace fastcompat::cuda::sm80
