// Top-k on Hopper (sm_90a): the screen of topk.cuh by wgmma and tensor copies. inner_ij = <q_i, k_j> * a_j + b_j of a
// tile is compared with one limit per row; what reaches it becomes a candidate, as an interval that holds its score.
// Fused: matrix product, metric, limit, the rows' lists. Read twice: keys, once per block of queries (from L2, for two
// blocks at a time: a cluster streams each tile once). Only the best k leave the lists, in another kernel.
//
// Roles as in softmax_sm90.cuh, with its stagger: one consumer screens what it has while the other multiplies. A
// consumer has FRAGMENTS x 64 queries, which stay in shared memory, and tiles of 128 keys that arrive in chunks of 64
// elements a row. A warp has its queries' lists to itself: whatever a survivor needs is settled inside the warp, so
// consumers meet at the ring of chunks alone. Survivors wait in shared memory until there are 32, one for each lane.
//
//   FRAGMENTS   queries   columns    stages          shared memory
//   2           256       up to 256  5 of 16 KiB     227,504 bytes
//   1           128       up to 512  5 of 16 KiB     227,504
// Floor: 2 B N D operations / 790 TF/s, the matrix rate measured on an H200; a score costs two instructions (multiply-
// add, maximum), which take a third of the issue slots of the products at D = 128. bench/LADDER.md has the counts.
#pragma once
#include "topk.cuh"
#include "walk_sm90.cuh"

namespace fastcompat::cuda::sm90 {

constexpr int kSurvivors = 64;  // that may wait in a warp: 31, and another of each lane
constexpr int kStages = 5, kSlots = 2, kChunk = TILE * kPanel;
constexpr int kQueryElements = 256 * 256;

// What is needed of a key besides its vector.
struct KeyFactors {
  float multiply, add;
};

struct QueryRow {
  RowFactors factors;
  ListState list;
};

struct Survivor {
  float inner;
  uint32_t where;  // key, from the split's first, * 32 + row of the warp
};

struct TopkMemory {
  static constexpr size_t kBarriersAt = 2 * (kQueryElements + kStages * kChunk);
  static constexpr size_t kKeysAt = kBarriersAt + (sizeof(Barriers<kStages, kSlots>) + 15) / 16 * 16;
  static constexpr size_t kFlagsAt = kKeysAt + kSlots * TILE * sizeof(KeyFactors);
  static constexpr size_t kRowsAt = kFlagsAt + (kSlots * 3 * sizeof(int) + 15) / 16 * 16;
  static constexpr size_t kSurvivorsAt = kRowsAt + 4 * kConsumers * 32 * sizeof(QueryRow);
  static constexpr size_t kBytes = kSurvivorsAt + 4 * kConsumers * kSurvivors * sizeof(Survivor);
};

// What fill_columns asks of a key.
struct KeyColumns {
  using Column = KeyFactors;
  const RowFactors* factors;
  int64_t begin, end;

  __device__ bool fill(KeyFactors& to, int key, int, int) const {
    const int64_t at = begin + key;
    to = {0, -CUDART_INF_F};
    if (at < end) to = {factors[at].multiply, factors[at].add};
    return false;
  }
};

// A warp's 16 * FRAGMENTS queries. Lane 4g + 2f + h owns row 8h + g of fragment f, one of the four that its quad holds.
template <int FRAGMENTS>
struct WarpRows {
  const TopkProblem& problem;
  const sm80::Screen& screen;
  QueryRow* rows;       // [32]
  Survivor* survivors;  // [kSurvivors]
  int64_t first;        // query of row 0
  int64_t begin;        // position of the split's first key
  int split, filled = 0;
  float level = 0;  // of the lane's own row, from refresh() on

  __device__ int64_t query_of(int row) const { return first + row % 4 / 2 * 64 + row % 2 * 8 + row / 4; }
  __device__ int64_t list_of(int row) const { return (query_of(row) - screen.first_query) * problem.splits + split; }
  __device__ bool owns() const { return lane() % 4 < 2 * FRAGMENTS && query_of(lane()) < screen.end_query; }

  // A row that is no query has a threshold that nothing reaches.
  __device__ void start() {
    QueryRow row = {{0, 0, 0, 0}, {CUDART_NAN_F, 0, NO_ID}};
    if (owns())
      row = {screen.space.query_factors[query_of(lane())], {-CUDART_INF_F, problem.counts[list_of(lane())], NO_ID}};
    rows[lane()] = row;
  }
  __device__ void find_level() {
    const QueryRow& row = rows[lane()];
    level = owns() ? inner_level(row.list.threshold, row.factors, screen.space) : CUDART_NAN_F;
  }
  __device__ void refresh() {
    if (owns()) rows[lane()].list.raise(shared_threshold(problem, query_of(lane()) - screen.first_query), NO_ID);
    find_level();
  }

  // Limits of the four rows that the quad holds.
  __device__ __forceinline__ void limits(const KeyBounds& tile, float (&out)[FRAGMENTS][2]) const {
    const float own = owns() ? limit_at(level, rows[lane()].factors, tile, screen.space) : CUDART_NAN_F;
#pragma unroll
    for (int i = 0; i < 2 * FRAGMENTS; ++i) out[i / 2][i % 2] = __shfl_sync(kAllLanes, own, lane() / 4 * 4 + i);
  }

  // One survivor of each lane that has one; they are settled 32 at a time.
  __device__ __forceinline__ void add(unsigned lanes, float inner, uint32_t where) {
    if (lanes >> lane() & 1) survivors[filled + __popc(lanes & ((1u << lane()) - 1))] = {inner, where};
    filled += __popc(lanes);
    if (filled >= 32) {
      drain(problem.capacity - 32);
      find_level();
    }
  }

  // Up to 32 survivors become candidates; lists longer than `longest` are made shorter.
  __device__ __forceinline__ void drain(int longest) {
    const int n = min(filled, 32);
    filled -= n;
    __syncwarp();
    if (lane() < n) {
      const Survivor s = survivors[filled + lane()];
      const int row = static_cast<int>(s.where % 32);
      const int64_t position = begin + s.where / 32;
      if (position < screen.end) {
        QueryRow& q = rows[row];
        float low, high;
        score_interval(s.inner, q.factors, screen.space.key_factors[position], screen.space, low, high);
        append(problem, screen.space, query_of(row), list_of(row), q.list, position, low, high);
      }
    }
    __syncwarp();
    for (unsigned m = __ballot_sync(kAllLanes, rows[lane()].list.count > longest); m; m &= m - 1) {
      const int row = __ffs(m) - 1;
      prune(problem, query_of(row), list_of(row), problem.thresholds + query_of(row) - screen.first_query,
            rows[row].list, nullptr);
    }
  }
};

// Which of a thread's scores in row h of a fragment reach the limit; and number e of them: registers have no index.
__device__ __forceinline__ uint32_t reaching(const float (&s)[TILE / 2], int h, float limit) {
  uint32_t which = 0;
#pragma unroll
  for (int e = 0; e < TILE / 4; ++e) which |= static_cast<uint32_t>(!(s[e / 2 * 4 + 2 * h + e % 2] < limit)) << e;
  return which;
}
template <int BIT = TILE / 8, int FIRST = 0>
__device__ __forceinline__ float pick(const float (&s)[TILE / 2], int h, int e) {
  if constexpr (BIT == 0) {
    return s[FIRST / 2 * 4 + 2 * h + FIRST % 2];
  } else {
    const float low = pick<BIT / 2, FIRST>(s, h, e), high = pick<BIT / 2, FIRST + BIT>(s, h, e);
    return e & BIT ? high : low;
  }
}

// report: screen_topk 168 registers; HGMMA.*, UTMALDG.2D*, USETMAXREG*, !HMMA*, !LDL*, !STL*
template <class T, int FRAGMENTS>
__global__ void __launch_bounds__(kThreads, 1)
    screen_topk(__grid_const__ TensorMap queries_map, __grid_const__ TensorMap keys_map,
                __grid_const__ sm80::Screen screen, __grid_const__ TopkProblem problem, Walk walk, int panels) {
  constexpr int kRows = 128 * FRAGMENTS, kAhead = 2;
  DYN_SMEM(smem);
  T* queries = reinterpret_cast<T*>(smem);
  T* ring = queries + kQueryElements;
  auto& bars = *reinterpret_cast<Barriers<kStages, kSlots>*>(smem + TopkMemory::kBarriersAt);
  auto* keys = reinterpret_cast<KeyFactors*>(smem + TopkMemory::kKeysAt);
  start(bars, walk);

  if (group() == kConsumers) {
    registers_down<24>();
    const Part at(walk, kRows);
    if (warp() == 0) {
      if (lane() == 0) {
        mbar_arrive_expect(&bars.rows, panels * kRows * 128);
        const int row = static_cast<int>(screen.first_query - screen.query.first) + at.row0;
        for (int p = 0; p < panels; ++p)
          for (int r = 0; r < kRows; r += 128)
            tensor_copy(queries + (p * kRows + r) * kPanel, queries_map, p * kPanel, row + r, &bars.rows);
        int key = static_cast<int>(screen.begin - screen.keys.first) + at.first * TILE, panel = 0;
#pragma unroll 1
        for (int n = 0; n < at.count * panels; ++n) {
          stream<TILE, kStages, 1>(bars, ring, keys_map, n, panel, key, walk);
          if (++panel == panels) panel = 0, key += TILE;
        }
      }
      __syncwarp();
    } else {
      fill_columns<TILE, kSlots>(KeyColumns{screen.space.key_factors, screen.begin, screen.end}, keys,
                                 reinterpret_cast<int*>(smem + TopkMemory::kFlagsAt), bars, at, kRows);
    }
  } else {
    registers_up<240>();
    const Part at(walk, kRows);
    const int group = sm90::group(), fragment0 = group * FRAGMENTS, all_warps = group * 4 + warp();
    const int t2 = lane() % 4 * 2;
    WarpRows<FRAGMENTS> rows = {problem,
                                screen,
                                reinterpret_cast<QueryRow*>(smem + TopkMemory::kRowsAt) + all_warps * 32,
                                reinterpret_cast<Survivor*>(smem + TopkMemory::kSurvivorsAt) + all_warps * kSurvivors,
                                screen.first_query + at.row0 + fragment0 * 64 + warp() * 16,
                                screen.begin + static_cast<int64_t>(at.first) * TILE,
                                at.split};
    rows.start();
    __syncwarp();
    const KeyBounds* bounds = screen.space.tiles + screen.begin / TILE + at.first;
    float s[FRAGMENTS][TILE / 2];
    const uint32_t rows_at = smem_addr(queries + fragment0 * 64 * kPanel) / 16, ring_at = smem_addr(ring) / 16;
    mbar_wait(&bars.rows, 0);
    if (group) mbar_wait(&bars.turn[1], 0);  // once: consumer 1 starts kAhead chunks after consumer 0
    int stage = 0, phase = 0;  // of the chunk that is next; the phase changes with every round of the ring
#pragma unroll 1
    for (int n = 0; n < at.count; ++n) {
      if (n % kRefresh == 0) rows.refresh();
      const KeyBounds tile = bounds[n];
#pragma unroll 1
      for (int p = 0; p < panels; ++p) {
        mbar_wait(&bars.full[stage], phase);
        wgmma_fence();
        const uint32_t a = opaque(rows_at) + p * (kRows * 128 / 16), b = opaque(ring_at) + stage * (kChunk / 8);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int f = 0; f < FRAGMENTS; ++f)
            wgmma_ss<T>(s[f], descriptor<16>(a + (f * 64 * 128 + k * 32) / 16), descriptor<16>(b + k * 32 / 16),
                        p + k > 0);
        wgmma_commit();
        if (p) {
          wgmma_wait<1>();
          release(&bars.empty[(stage + kStages - 1) % kStages], walk.cluster);
        }
        if (n == 0 && p + 1 == min(kAhead, panels) && group == 0 && lane() == 0) mbar_arrive(&bars.turn[1]);
        if (p + 1 < panels && ++stage == kStages) stage = 0, phase ^= 1;  // the last chunk's stage is released below
      }
      wgmma_wait<0>();
      release(&bars.empty[stage], walk.cluster);
      if (++stage == kStages) stage = 0, phase ^= 1;
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) hold(s[f]);

      const int slot = n % kSlots;
      mbar_wait(&bars.columns_full[slot], n / kSlots & 1);
      float top[FRAGMENTS][2], limit[FRAGMENTS][2];
#pragma unroll
      for (int i = 0; i < 2 * FRAGMENTS; ++i) top[i / 2][i % 2] = -CUDART_INF_F;
#pragma unroll
      for (int j = 0; j < TILE / 8; ++j) {
        const float4 k = *reinterpret_cast<const float4*>(keys + slot * TILE + j * 8 + t2);
#pragma unroll
        for (int i = 0; i < 2 * FRAGMENTS; ++i) {
          float& left = s[i / 2][4 * j + i % 2 * 2];
          float& right = s[i / 2][4 * j + i % 2 * 2 + 1];
          left = __fmaf_rn(left, k.x, k.y);
          right = __fmaf_rn(right, k.z, k.w);
          // A NaN is overlooked, but then the limit is -inf.
          top[i / 2][i % 2] = fmaxf(top[i / 2][i % 2], fmaxf(left, right));
        }
      }
      __syncwarp();
      if (lane() == 0) mbar_arrive(&bars.columns_empty[slot]);
      rows.limits(tile, limit);
      unsigned reached = 0;  // bit i: some row of the warp in this half of a fragment has a survivor
#pragma unroll
      for (int i = 0; i < 2 * FRAGMENTS; ++i) {
        const bool mine = top[i / 2][i % 2] >= limit[i / 2][i % 2];
        if (!mine) limit[i / 2][i % 2] = CUDART_INF_F;
        reached |= static_cast<unsigned>(__any_sync(kAllLanes, mine)) << i;
      }
#pragma unroll 1
      for (int i = 0; reached >> i; ++i) {
        if (!(reached >> i & 1)) continue;
        uint32_t left = 0;
#pragma unroll
        for (int known = 0; known < 2 * FRAGMENTS; ++known)
          if (known == i) left = reaching(s[known / 2], known % 2, limit[known / 2][known % 2]);
        while (const unsigned lanes = __ballot_sync(kAllLanes, left)) {
          const int e = __ffs(left) - 1;
          float inner = 0;
#pragma unroll
          for (int known = 0; known < 2 * FRAGMENTS; ++known)
            if (known == i) inner = pick(s[known / 2], known % 2, e);
          // Score e of the half is column e / 2 * 8 + 2t + e % 2; row number 4g + i, as WarpRows counts.
          rows.add(lanes, inner, static_cast<uint32_t>(n * TILE + e / 2 * 8 + t2 + e % 2) * 32 + lane() / 4 * 4 + i);
          left &= left - 1;
        }
      }
    }
    rows.drain(problem.k);
    if (rows.owns()) problem.counts[rows.list_of(lane())] = rows.rows[lane()].list.count;
  }
  if (opaque(walk.cluster) > 1) cluster_sync();
}

}  // namespace fastcompat::cuda::sm90
