// Hopper kernels (sm_90a) of the softmax engine: wgmma reads tiles that the tensor copy engine fetched, mbarriers pass
// them on. Three warpgroups: one producer (24 registers a thread; warp 0 streams tiles, warps 1 to 3 what a column
// brings besides its vector: label, bias, log-sum-exp, gradients), two consumers (240). Blocks form clusters of two
// that stream the same columns, each fetching half for both.
//
//   two_products             O[128, D] += f(S) Y, S = X Y^T of a streamed tile Y, which is loaded once and used by both
//                            products (K = V). f(S) never leaves registers. A consumer has 64 rows; it issues S of the
//                            next tile and O of this one, then computes f while they run and the other consumer issues
//                            its own.
//     LogSumExp              X = queries, Y = keys: log-sum-exp over negatives and mean key (the query gradient)
//     KeyCoefficients        X = keys, Y = queries: the key gradient, from known log-sum-exps: no maximum, no rescaling
//   two_products_in_halves   the same for 512 columns, where 64 rows of O fill the registers of both consumers
//   one_product              statistics alone (one_product_sm90.cuh)
//
// Operations are 2 B N D a product; read twice: nothing within a walk (a second block of rows streams the columns
// again, from L2). Floor: operations / 790 TF/s, the matrix rate measured on an H200; bench/LADDER.md has floors and
// predictions.
//
//   kernel                        rows x columns  stages                   shared memory (forward / key gradient)
//   two_products D = 64           128 x 192       4 of 24 KiB              127,648 / 130,720 bytes
//                D = 128          128 x 160       4 of 40 KiB              208,800 / 210,336
//                D = 256          128 x 80        3 of 40 KiB              198,672 / 196,368
//   two_products_in_halves        64 x 128        4 quarters of 32 KiB     223,360 / 220,288
//   one_product  D = 64           256 x 128       8 of 16 KiB              167,128
//                D = 128          256 x 128       8 of 16 KiB              199,896
//                D = 256          256 x 128       6 of 16 KiB              231,068
//                D = 512          128 x 192       4 of 24 KiB              231,804
// Dimensions in between run as the next larger one: the copy engine fills up with zeros.
#pragma once
#include "key_grad_sm90.cuh"
#include "walk_sm90.cuh"

namespace fastcompat::cuda::sm90 {

// Two products over one streamed tile.
template <int D>
struct TwoProducts {
  static constexpr int kRows = 128,
                       kColumns = D == 64    ? 192
                                  : D == 128 ? 160
                                             : 80,
                       kStages = D == 256 ? 3 : 4, kSlots = 2;
  static constexpr int kPanels = D / kPanel, kTile = kColumns * D;
  template <class Reduction>
  struct Memory {
    static constexpr size_t kOperands = 2 * (kRows * D + kStages * kTile);
    static constexpr size_t kColumnsAt = kOperands + (sizeof(Barriers<kStages, kSlots>) + 15) / 16 * 16;
    static constexpr size_t kFlagsAt = kColumnsAt + kSlots * kColumns * sizeof(typename Reduction::Column);
    static constexpr size_t kTotalsAt = kFlagsAt + (kSlots * 3 * sizeof(int) + 15) / 16 * 16;
    static constexpr size_t kBytes = kTotalsAt + 128 * kConsumers * sizeof(typename Reduction::Totals);
  };
};

// report: two_products 168 registers; HGMMA.*, UTMALDG.2D*, USETMAXREG*, !HMMA*, !LDL*, !STL*
template <class T, int D, class Reduction>
__global__ void __launch_bounds__(kThreads, 1)
    two_products(__grid_const__ TensorMap rows_map, __grid_const__ TensorMap columns_map, Reduction reduction,
                 Walk walk) {
  using Shape = TwoProducts<D>;
  using Memory = typename Shape::template Memory<Reduction>;
  constexpr int kColumns = Shape::kColumns, kStages = Shape::kStages, kSlots = Shape::kSlots, kPanels = Shape::kPanels;
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
          tensor_copy(rows + p * Shape::kRows * kPanel, rows_map, p * kPanel, at.row0, &bars.rows);
#pragma unroll 1
        for (int n = 0; n < at.count; ++n)
          stream<kColumns, kStages, kPanels>(bars, ring, columns_map, n, 0, (at.first + n) * kColumns, walk);
      }
      __syncwarp();
    } else if (reduction.columns_wanted()) {
      fill_columns<kColumns, kSlots>(reduction, columns, flags, bars, at, Shape::kRows);
    }
  } else {
    registers_up<240>();
    const Part at(walk, Shape::kRows);
    const int group = sm90::group();
    auto state = reduction.begin(at.row0 + group * 64 + warp() * 16 + lane() / 4);
    auto& totals = reinterpret_cast<typename Reduction::Totals*>(smem + Memory::kTotalsAt)[threadIdx.x];
    totals.clear();
    float o[D / 2], s[kColumns / 2];
    uint32_t p[kColumns / 16][4];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

    const uint32_t rows_at = smem_addr(rows + group * 64 * kPanel) / 16, ring_at = smem_addr(ring) / 16;
    // Consumers take turns at issuing, consumer 0 first, so that one computes exponentials while the other multiplies.
    // Turn i of consumer c waits for phase i - 1 + c of turn[c], which the other's pass of that number ends: parity
    // (i + 1 + c) & 1. Consumer 0's turn 0 names the phase before the first, which counts as ended.
    auto turn = [&](int i) { mbar_wait(&bars.turn[group], (i + 1 + group) & 1); };
    auto pass = [&] {
      if (lane() == 0) mbar_arrive(&bars.turn[1 - group]);
    };
    // S = X Y^T of tile n. Element 16k of a row lies in panel k / 4, 32 bytes for each k % 4.
    auto first_product = [&](int n) {
      const uint32_t a = opaque(rows_at), b = opaque(ring_at + n % kStages * (Shape::kTile / 8));
#pragma unroll
      for (int k = 0; k < D / 16; ++k)
        wgmma_ss<T>(s, descriptor<16>(a + (k / 4 * Shape::kRows * 128 + k % 4 * 32) / 16),
                    descriptor<16>(b + (k / 4 * kColumns * 128 + k % 4 * 32) / 16), k > 0);
      wgmma_commit();
    };
    // O += P Y of tile n, p from registers; 16 rows of Y are 2048 bytes on, its panels kColumns rows apart.
    auto second_product = [&](int n) {
      const uint32_t b = opaque(ring_at + n % kStages * (Shape::kTile / 8));
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k)
        wgmma_rs_t<T>(o, p[k], descriptor<kColumns * kPanel * 2>(b + k * 2048 / 16), true);
      wgmma_commit();
    };

    mbar_wait(&bars.rows, 0);
    mbar_wait(&bars.full[0], 0);  // piece 0 is use 0 of its stage
    turn(0);
    wgmma_fence();
    first_product(0);
    pass();
    wgmma_wait<0>();
    hold(s);
    // Here S of tile n is there, and O of tile n - 1 may still run, reading p and its stage.
    for (int n = 0;; ++n) {
      const int slot = n % kSlots;
      if (reduction.columns_wanted()) mbar_wait(&bars.columns_full[slot], n / kSlots & 1);
      reduction.tile(s, state, totals, (at.first + n) * kColumns, columns + slot * kColumns, flags + slot * 3);
      if (reduction.columns_wanted()) {
        __syncwarp();
        if (lane() == 0) mbar_arrive(&bars.columns_empty[slot]);
      }
      wgmma_wait<0>();  // O of tile n - 1: p may be overwritten, o rescaled, and both products have left the stage
      hold(o);
      if (n) release(&bars.empty[(n - 1) % kStages], walk.cluster);
      reduction.correct(o, state);
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[k][i] = pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
      if (n + 1 == at.count) break;
      mbar_wait(&bars.full[(n + 1) % kStages], (n + 1) / kStages & 1);
      turn(n + 1);
      wgmma_fence();
      first_product(n + 1);
      second_product(n);
      pass();
      wgmma_wait<1>();  // S of tile n + 1 alone
      hold(s);
    }
    wgmma_fence();
    second_product(at.count - 1);
    wgmma_wait<0>();
    hold(o);
    release(&bars.empty[(at.count - 1) % kStages], walk.cluster);
    reduction.finish(state, totals, Part(walk, Shape::kRows).split);
    reduction.store(o, state, Part(walk, Shape::kRows).split);
  }
  if (opaque(walk.cluster) > 1) cluster_sync();
}

// Two products when a row of o fills the registers of two warpgroups: 64 rows, each consumer has half of o's columns,
// so that both need all exponentials. Of a tile's 128 columns each consumer multiplies and exponentiates 64 and hands
// them to the other through shared memory. A tile arrives in quarters of 64 columns x 256 elements, each given back as
// soon as its last reader is through; quarter(owner, half) numbers them in the order of that.
struct TwoProductsInHalves {
  static constexpr int kDim = 512, kRows = 64, kOwn = 64, kColumns = 2 * kOwn, kStages = 4, kSlots = 1;
  static constexpr int kQuarter = kOwn * kDim / 2, kPanels = kDim / kPanel, kShared = kRows * kPanel;
  template <class Reduction>
  struct Memory {
    static constexpr size_t kSharedAt = 2 * (kRows * kDim + kStages * kQuarter);
    static constexpr size_t kBarriersAt = kSharedAt + 2 * kConsumers * kShared;
    static constexpr size_t kTopsAt = kBarriersAt + (sizeof(Barriers<kStages, kSlots>) + 15) / 16 * 16;
    static constexpr size_t kColumnsAt = kTopsAt + kConsumers * kRows * sizeof(float);
    static constexpr size_t kFlagsAt = kColumnsAt + kSlots * kColumns * sizeof(typename Reduction::Column);
    static constexpr size_t kTotalsAt = kFlagsAt + (kSlots * 3 * sizeof(int) + 15) / 16 * 16;
    static constexpr size_t kBytes = kTotalsAt + 128 * kConsumers * sizeof(typename Reduction::Totals);
  };
  __device__ static int quarter(int owner, int half) { return owner == half ? owner : 2 + half; }
};

// report: two_products_in_halves 168 registers; HGMMA.*, UTMALDG.2D*, USETMAXREG*, !HMMA*, !LDL*, !STL*
template <class T, class Reduction>
__global__ void __launch_bounds__(kThreads, 1)
    two_products_in_halves(__grid_const__ TensorMap rows_map, __grid_const__ TensorMap columns_map, Reduction reduction,
                           Walk walk) {
  using Shape = TwoProductsInHalves;
  using Memory = typename Shape::template Memory<Reduction>;
  constexpr int kOwn = Shape::kOwn, kStages = Shape::kStages, kHalfPanels = Shape::kPanels / 2;
  DYN_SMEM(smem);
  T* rows = reinterpret_cast<T*>(smem);
  T* ring = rows + Shape::kRows * Shape::kDim;
  T* shared = reinterpret_cast<T*>(smem + Memory::kSharedAt);
  auto& bars = *reinterpret_cast<Barriers<kStages, Shape::kSlots>*>(smem + Memory::kBarriersAt);
  float* tops = reinterpret_cast<float*>(smem + Memory::kTopsAt);
  auto* columns = reinterpret_cast<typename Reduction::Column*>(smem + Memory::kColumnsAt);
  int* flags = reinterpret_cast<int*>(smem + Memory::kFlagsAt);
  start(bars, walk);

  if (group() == kConsumers) {
    registers_down<24>();
    const Part at(walk, Shape::kRows);
    if (warp() == 0) {
      if (lane() == 0) {
        mbar_arrive_expect(&bars.rows, Shape::kRows * Shape::kDim * 2);
        for (int p = 0; p < Shape::kPanels; ++p)
          tensor_copy(rows + p * Shape::kRows * kPanel, rows_map, p * kPanel, at.row0, &bars.rows);
#pragma unroll 1
        for (int n = 0; n < at.count * kStages; ++n) {
          // Quarter q lies in stage q, always: 0 and 1 the halves that owners 0 and 1 read in both products, 2 and 3
          // the other owner's columns of the same halves.
          const int quarter = n % kStages, half = quarter % 2, owner = quarter < 2 ? half : 1 - half;
          stream<kOwn, kStages, kHalfPanels>(bars, ring, columns_map, n, half * kHalfPanels,
                                             (at.first + n / kStages) * Shape::kColumns + owner * kOwn, walk);
        }
      }
      __syncwarp();
    } else if (reduction.columns_wanted()) {
      fill_columns<Shape::kColumns, Shape::kSlots>(reduction, columns, flags, bars, at, Shape::kRows);
    }
  } else {
    registers_up<240>();
    const Part at(walk, Shape::kRows);
    const int own = sm90::group(), other = 1 - own;  // consumers, and also the halves of o that they have
    const int g = lane() / 4, row = warp() * 16 + g;
    auto state = reduction.begin(at.row0 + row);
    auto& totals = reinterpret_cast<typename Reduction::Totals*>(smem + Memory::kTotalsAt)[threadIdx.x];
    totals.clear();
    float o[Shape::kDim / 4], s[kOwn / 2];
    uint32_t p[kOwn / 16][4];
#pragma unroll
    for (int i = 0; i < Shape::kDim / 4; ++i) o[i] = 0.0f;
    const uint32_t rows_at = smem_addr(rows) / 16, ring_at = smem_addr(ring) / 16;
    const uint32_t other_at = smem_addr(shared + other * Shape::kShared) / 16;
    char* const mine = reinterpret_cast<char*>(shared + own * Shape::kShared) + row * 128 + lane() % 4 * 4;

    mbar_wait(&bars.rows, 0);
    for (int n = 0; n < at.count; ++n) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        // Own columns, own half of the elements first. Stage q is used once a tile: use n, parity n & 1.
        const int half = part ? other : own, quarter = Shape::quarter(own, half);
        mbar_wait(&bars.full[quarter], n & 1);
        wgmma_fence();
        const uint32_t a = opaque(rows_at + half * (kHalfPanels * Shape::kRows * 8));
        const uint32_t b = opaque(ring_at + quarter * (Shape::kQuarter / 8));
#pragma unroll
        for (int k = 0; k < 4 * kHalfPanels; ++k)
          wgmma_ss<T>(s, descriptor<16>(a + (k / 4 * Shape::kRows * 128 + k % 4 * 32) / 16),
                      descriptor<16>(b + (k / 4 * kOwn * 128 + k % 4 * 32) / 16), part + k > 0);
        wgmma_commit();
      }
      wgmma_wait<0>();
      hold(s);
      // Two products read each stage, of both consumers or both of one: 4 * kConsumers arrivals in any case.
      release(&bars.empty[Shape::quarter(own, 0)], walk.cluster);
      release(&bars.empty[Shape::quarter(own, 1)], walk.cluster);

      if (reduction.columns_wanted()) mbar_wait(&bars.columns_full[0], n & 1);
      float reached[2];
      const auto* mine_columns = columns + own * kOwn;
      const float scale =
          reduction.logits(s, state, totals, (at.first + n) * Shape::kColumns + own * kOwn, mine_columns, reached);
      if (lane() % 4 == 0) tops[own * Shape::kRows + row] = reached[0], tops[own * Shape::kRows + row + 8] = reached[1];
      bar_sync(1,
               128 * kConsumers);  // both maxima are written, and the other's product of the tile before has read mine
#pragma unroll
      for (int h = 0; h < 2; ++h) reached[h] = fmaxf(reached[h], tops[other * Shape::kRows + row + 8 * h]);
      reduction.raise(state, reached);
      reduction.exponentials(s, state, scale, totals, mine_columns, flags);
      if (reduction.columns_wanted()) {
        __syncwarp();
        if (lane() == 0) mbar_arrive(&bars.columns_empty[0]);
      }
      reduction.correct(o, state);
#pragma unroll
      for (int k = 0; k < kOwn / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[k][i] = pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
          // Register i has row 8 * (i % 2) + g and columns 16k + 8 * (i / 2) on, in the 128-byte swizzle.
          *reinterpret_cast<uint32_t*>(mine + i % 2 * 1024 + ((2 * k + i / 2) ^ g % 8) * 16) = p[k][i];
        }
      fence_proxy_async();            // plain stores, which wgmma reads through the asynchronous proxy
      bar_sync(1, 128 * kConsumers);  // both halves of the exponentials are written; tops may be overwritten

      wgmma_fence();
      constexpr int kPanelBytes = kOwn * 128;
      const uint32_t mine_at = opaque(ring_at + own * (Shape::kQuarter / 8));
#pragma unroll
      for (int k = 0; k < kOwn / 16; ++k)
        wgmma_rs_t<T>(o, p[k], descriptor<kPanelBytes>(mine_at + k * 2048 / 16), true);
      wgmma_commit();
      mbar_wait(&bars.full[2 + own], n & 1);
      wgmma_fence();
      const uint32_t b = opaque(ring_at + (2 + own) * (Shape::kQuarter / 8)), a = opaque(other_at);
#pragma unroll
      for (int k = 0; k < kOwn / 16; ++k)
        wgmma_ss_t<T>(o, descriptor<16>(a + k * 32 / 16), descriptor<kPanelBytes>(b + k * 2048 / 16), true);
      wgmma_commit();
      wgmma_wait<1>();  // the product with own columns
      release(&bars.empty[own], walk.cluster);
      wgmma_wait<0>();  // and the one with the other's
      hold(o);
      release(&bars.empty[2 + own], walk.cluster);
    }
    const int split = Part(walk, Shape::kRows).split;
    reduction.finish(state, totals, split * kConsumers + own);
    reduction.store(o, state, split, own * (Shape::kDim / 2));
  }
  if (opaque(walk.cluster) > 1) cluster_sync();
}

}  // namespace fastcompat::cuda::sm90
