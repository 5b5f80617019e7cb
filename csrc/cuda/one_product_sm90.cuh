// Statistics alone: one product, so the matrix unit wants twice the exponentials and twice the columns a second. A
// consumer holds kFragments x 64 rows of logits, columns come in chunks of 64 elements a row. The second consumer
// starts kAhead chunks after the first; from then on each computes exponentials while the other multiplies.
#pragma once
#include "logits_sm90.cuh"
#include "walk_sm90.cuh"

namespace fastcompat::cuda::sm90 {

template <int D>
struct OneProduct {
  static constexpr int kFragments = D == 512 ? 1 : 2, kRows = 128 * kFragments;
  static constexpr int kColumns = D == 512 ? 192 : 128, kPanels = D / kPanel, kAhead = kPanels < 2 ? 1 : 2;
  static constexpr int kStages = D == 512 ? 4 : D == 256 ? 6 : 8, kSlots = D >= 256 ? 1 : 2;
  static constexpr int kChunk = kColumns * kPanel;
  template <class Reduction>
  struct Memory {
    static constexpr size_t kOperands = 2 * (kRows * D + kStages * kChunk);
    static constexpr size_t kColumnsAt = kOperands + (sizeof(Barriers<kStages, kSlots>) + 15) / 16 * 16;
    static constexpr size_t kFlagsAt = kColumnsAt + kSlots * kColumns * sizeof(typename Reduction::Column);
    static constexpr size_t kBytes = kFlagsAt + kSlots * 3 * sizeof(int);
  };
};

// report: one_product 168 registers; HGMMA.*, UTMALDG.2D*, USETMAXREG*, !HMMA*, !LDL*, !STL*
template <class T, int D, class Reduction>
__global__ void __launch_bounds__(kThreads, 1)
    one_product(__grid_const__ TensorMap rows_map, __grid_const__ TensorMap columns_map, Reduction reduction,
                Walk walk) {
  using Shape = OneProduct<D>;
  using Memory = typename Shape::template Memory<Reduction>;
  constexpr int kColumns = Shape::kColumns, kStages = Shape::kStages, kSlots = Shape::kSlots, kPanels = Shape::kPanels;
  constexpr int kFragments = Shape::kFragments;
  DYN_SMEM(smem);
  T* rows = reinterpret_cast<T*>(smem);
  T* ring = rows + Shape::kRows * D;
  auto& bars = *reinterpret_cast<Barriers<kStages, kSlots>*>(smem + Memory::kOperands);
  auto* columns = reinterpret_cast<typename Reduction::Column*>(smem + Memory::kColumnsAt);
  int* flags = reinterpret_cast<int*>(smem + Memory::kFlagsAt);
  start(bars, walk);

  if (group() == kConsumers) {
    registers_down<24>();
    const Part at(walk, Shape::kRows);
    if (warp() == 0) {
      if (lane() == 0) {
        mbar_arrive_expect(&bars.rows, Shape::kRows * D * 2);
        for (int p = 0; p < kPanels; ++p)
          for (int r = 0; r < Shape::kRows; r += 128)
            tensor_copy(rows + (p * Shape::kRows + r) * kPanel, rows_map, p * kPanel, at.row0 + r, &bars.rows);
#pragma unroll 1
        for (int n = 0; n < at.count * kPanels; ++n)
          stream<kColumns, kStages, 1>(bars, ring, columns_map, n, n % kPanels, (at.first + n / kPanels) * kColumns,
                                       walk);
      }
      __syncwarp();
    } else if (reduction.columns_wanted()) {
      fill_columns<kColumns, kSlots>(reduction, columns, flags, bars, at, Shape::kRows);
    }
  } else {
    registers_up<240>();
    const Part at(walk, Shape::kRows);
    const int group = sm90::group();
    typename Reduction::RowState state[kFragments];
    typename Reduction::Totals totals[kFragments];
    float s[kFragments][kColumns / 2];
    const int fragment0 = group * kFragments;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
      state[f] = reduction.begin(at.row0 + (fragment0 + f) * 64 + warp() * 16 + lane() / 4);
      totals[f].clear();
    }
    const uint32_t rows_at = smem_addr(rows + fragment0 * 64 * kPanel) / 16, ring_at = smem_addr(ring) / 16;
    mbar_wait(&bars.rows, 0);
    // Consumer 1 waits once, until consumer 0 has issued kAhead chunks: from then on they stay apart by themselves.
    if (group) mbar_wait(&bars.turn[1], 0);
    for (int n = 0; n < at.count; ++n) {
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        const int chunk = n * kPanels + p;
        mbar_wait(&bars.full[chunk % kStages], chunk / kStages & 1);
        wgmma_fence();
        const uint32_t a = opaque(rows_at), b = opaque(ring_at + chunk % kStages * (Shape::kChunk / 8));
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int f = 0; f < kFragments; ++f)
            wgmma_ss<T>(s[f], descriptor<16>(a + ((p * Shape::kRows + f * 64) * 128 + k * 32) / 16),
                        descriptor<16>(b + k * 32 / 16), p + k > 0);
        wgmma_commit();
        if (p) {  // the chunk before has been read; the last of a tile is released below
          wgmma_wait<1>();
          release(&bars.empty[(chunk - 1) % kStages], walk.cluster);
        }
        if (n == 0 && p + 1 == Shape::kAhead && group == 0 && lane() == 0) mbar_arrive(&bars.turn[1]);
      }
      wgmma_wait<0>();
      release(&bars.empty[(n * kPanels + kPanels - 1) % kStages], walk.cluster);
#pragma unroll
      for (int f = 0; f < kFragments; ++f) hold(s[f]);
      const int slot = n % kSlots;
      if (reduction.columns_wanted()) mbar_wait(&bars.columns_full[slot], n / kSlots & 1);
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
        reduction.tile(s[f], state[f], totals[f], (at.first + n) * kColumns, columns + slot * kColumns,
                       flags + slot * 3);
      if (reduction.columns_wanted()) {
        __syncwarp();
        if (lane() == 0) mbar_arrive(&bars.columns_empty[slot]);
      }
    }
#pragma unroll
    for (int f = 0; f < kFragments; ++f) reduction.finish(state[f], totals[f], Part(walk, Shape::kRows).split);
  }
  if (opaque(walk.cluster) > 1) cluster_sync();
}

}  // namespace fastcompat::cuda::sm90
