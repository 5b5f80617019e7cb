// The walk of a Hopper block over streamed columns: roles, barriers, the producer's part, descriptors.
#pragma once
#include "logits_sm90.cuh"

namespace fastcompat::cuda::sm90 {

constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1), kFillers = 96;
constexpr int kPanel = 64;  // columns of a panel: 128 bytes, the swizzle's span

// Rows stay, columns are streamed; block b of the grid takes rows b % blocks and tiles of split b / blocks.
struct Walk {
  int blocks, tiles, tiles_per_split, cluster;
};

inline Walk make_walk(int64_t rows, int64_t columns, int rows_a_block, int columns_a_tile) {
  const int64_t blocks = (rows + rows_a_block - 1) / rows_a_block;
  Walk walk;
  walk.cluster = blocks > 1 ? 2 : 1;
  walk.blocks = static_cast<int>((blocks + walk.cluster - 1) / walk.cluster * walk.cluster);
  walk.tiles = static_cast<int>((columns + columns_a_tile - 1) / columns_a_tile);
  walk.tiles_per_split = walk.tiles;
  return walk;
}

// All barriers of a block, and who meets at each. A stage of the ring holds a piece of the stream (a tile, a panel or a
// quarter of one), a slot what a tile's columns have besides their vectors. Use number u of a stage (u = n / STAGES for
// piece n) waits for phases of parity u & 1 of `full` and (u - 1) & 1 of `empty`: an mbarrier starts in phase 0, so the
// first use waits for no `empty`, the second for phase 0, which ends when every reader has left the first.
//
//   barrier          filled by (arrivals a phase)                         waited for by
//   rows             producer's thread 0, once (1 + the rows' bytes)      consumers, parity 0
//   full[stage]      producer's thread 0 (1 + the piece's bytes; the      consumers, before the first product reads it
//                    bytes of the other half come from the other block)
//   empty[stage]     lane 0 of each consumer warp of every block of the   producer's thread 0, before it fills it
//   again:
//                    cluster (8 or 16): a copy writes into both blocks    its copy writes into both blocks
//   columns_full     the 96 threads of the producer's warps 1 to 3        consumers, before they use a tile's scores
//   columns_empty    lane 0 of each consumer warp (8)                     fillers, before they write the slot again
//   turn[consumer]   lane 0 of each warp of the other consumer (4)        the consumer: it may issue its products now
template <int STAGES, int SLOTS>
struct Barriers {
  uint64_t rows, full[STAGES], empty[STAGES], columns_full[SLOTS], columns_empty[SLOTS], turn[kConsumers];

  __device__ void init(int cluster) {
    mbar_init(&rows, 1);
    for (int i = 0; i < STAGES; ++i) {
      mbar_init(&full[i], 1);
      mbar_init(&empty[i], 4 * kConsumers * cluster);  // 4 warps of each consumer
    }
    for (int i = 0; i < SLOTS; ++i) {
      mbar_init(&columns_full[i], kFillers);
      mbar_init(&columns_empty[i], 4 * kConsumers);
    }
    for (uint64_t& t : turn) mbar_init(&t, 4);
    fence_mbar_init();
  }
};

// A descriptor of a tile in shared memory, as wgmma wants it: bits 0-13 the address / 16, to which offsets / 16 may be
// added; 16-29 the distance of panels / 16 (ignored for K-major tiles, 1 by convention); 32-45 the distance of groups
// of 8 rows / 16, 8 rows of 128 bytes; 62-63 = 1, the 128-byte swizzle. Addresses stay below 2^18, so that sums never
// carry.
template <int PANEL>
__device__ __forceinline__ uint64_t descriptor(uint32_t at) {
  constexpr uint64_t kConstant = uint64_t(PANEL >> 4 & 0x3fff) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
  return kConstant | at;
}

__device__ __forceinline__ int uniform(int v) { return __shfl_sync(kAllLanes, v, 0); }

__device__ __forceinline__ int group() { return uniform(threadIdx.x / 128); }
__device__ __forceinline__ int warp() { return uniform(threadIdx.x / 32 % 4); }
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// The block's part of the walk. Each role works it out for itself, and its end does again: nothing is kept across.
struct Part {
  int split, first, count, row0;

  __device__ Part(const Walk& walk, int rows) {
    const unsigned block = opaque(blockIdx.x), blocks = static_cast<unsigned>(walk.blocks);
    split = static_cast<int>(block / blocks);
    first = split * walk.tiles_per_split;
    count = min(walk.tiles_per_split, walk.tiles - first);
    row0 = static_cast<int>(block % blocks) * rows;
  }
};

template <class Bars>
__device__ void start(Bars& bars, const Walk& walk) {
  if (threadIdx.x == 0) bars.init(walk.cluster);
  __syncthreads();
  if (opaque(walk.cluster) > 1) cluster_sync();
}

// One thread: the n-th piece of the stream, PANELS panels from number `panel` on of COLUMNS columns, of which each
// block of a cluster fetches half, for both.
template <int COLUMNS, int STAGES, int PANELS, class T, class Bars>
__device__ __forceinline__ void stream(Bars& bars, T* ring, const TensorMap& map, int n, int panel, int column,
                                       const Walk& walk) {
  constexpr int kHalf = COLUMNS / 2;
  constexpr unsigned kBothBlocks = 0b11;
  const int stage = n % STAGES;
  T* to = ring + stage * PANELS * COLUMNS * kPanel;
  uint64_t* full = &bars.full[stage];
  // All readers of the stage's last piece, in both blocks: this copy writes into both.
  if (n >= STAGES) mbar_wait_cluster(&bars.empty[stage], (n / STAGES - 1) & 1);
  // This block's barrier counts all bytes that arrive here, the half that the other block fetches among them.
  mbar_arrive_expect(full, PANELS * COLUMNS * 128);
#pragma unroll
  for (int p = 0; p < PANELS; ++p) {
    T* at = to + p * COLUMNS * kPanel;
    if (walk.cluster > 1) {
      const int rank = cluster_rank();
      tensor_copy_multicast(at + rank * kHalf * kPanel, map, (panel + p) * kPanel, column + rank * kHalf, full,
                            kBothBlocks);
    } else {
      tensor_copy(at, map, (panel + p) * kPanel, column, full);
      tensor_copy(at + kHalf * kPanel, map, (panel + p) * kPanel, column + kHalf, full);
    }
  }
}

// Warps 1 to 3 of the producer: what each column brings besides its vector.
template <int COLUMNS, int SLOTS, class Reduction, class Bars>
__device__ void fill_columns(const Reduction& reduction, typename Reduction::Column* columns, int* flags, Bars& bars,
                             const Part& at, int rows) {
  const int filler = threadIdx.x % 128 - 32;
#pragma unroll 1
  for (int n = 0; n < at.count; ++n) {
    const int slot = n % SLOTS;
    if (n >= SLOTS) mbar_wait(&bars.columns_empty[slot], (n / SLOTS - 1) & 1);
    bool slow = false;
#pragma unroll 1
    for (int c = filler; c < COLUMNS; c += kFillers)
      slow |= reduction.fill(columns[slot * COLUMNS + c], (at.first + n) * COLUMNS + c, at.row0, rows);
    slow = __any_sync(kAllLanes, slow);
    if (lane() == 0) flags[slot * 3 + filler / 32] = slow;
    mbar_arrive(&bars.columns_full[slot]);
  }
}

// One lane of each warp says that the warp has done with a stage, to every block that shares it.
__device__ __forceinline__ void release(uint64_t* empty, int cluster) {
  if (threadIdx.x % 32) return;
  mbar_arrive(empty);
  if (cluster > 1) mbar_free_remote(empty, 1 - cluster_rank());
}

}  // namespace fastcompat::cuda::sm90
