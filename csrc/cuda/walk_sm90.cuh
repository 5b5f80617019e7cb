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

// All barriers of a block.
template <int STAGES, int SLOTS>
struct Barriers {
  uint64_t rows, full[STAGES], empty[STAGES], columns_full[SLOTS], columns_empty[SLOTS], turn[kConsumers];

  __device__ void init(int cluster) {
    mbar_init(&rows, 1);
    for (int i = 0; i < STAGES; ++i) {
      mbar_init(&full[i], 1);
      mbar_init(&empty[i], 4 * kConsumers * cluster);
    }
    for (int i = 0; i < SLOTS; ++i) {
      mbar_init(&columns_full[i], kFillers);
      mbar_init(&columns_empty[i], 4 * kConsumers);
    }
    for (uint64_t& t : turn) mbar_init(&t, 4);
    fence_mbar_init();
  }
};

// A descriptor is a constant and, in its lowest bits, an address / 16, to which offsets / 16 are added.
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
  const int stage = n % STAGES;
  T* to = ring + stage * PANELS * COLUMNS * kPanel;
  uint64_t* full = &bars.full[stage];
  if (n >= STAGES) mbar_wait_cluster(&bars.empty[stage], (n / STAGES - 1) & 1);
  mbar_arrive_expect(full, PANELS * COLUMNS * 128);
#pragma unroll
  for (int p = 0; p < PANELS; ++p) {
    T* at = to + p * COLUMNS * kPanel;
    if (walk.cluster > 1) {
      const int rank = cluster_rank();
      tensor_copy_multicast(at + rank * kHalf * kPanel, map, (panel + p) * kPanel, column + rank * kHalf, full, 3);
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
