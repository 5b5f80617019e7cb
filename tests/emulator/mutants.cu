// The harness's own test: two kernels that are right, and the same with one bug each. CMakeLists.txt says which build
// (plain, AddressSanitizer, ThreadSanitizer) reports each bug and how.
#include "device_test.h"
#include "ops90.h"

using namespace fastcompat::cuda;
using namespace device_test;

enum Bug {
  NONE,
  // pipeline80
  NO_BARRIER_AFTER_WAIT,
  WAITS_FOR_TOO_FEW_GROUPS,
  READS_PAST_THE_END,
  TAIL_LEFT_UNINITIALISED,
  NO_BARRIER_BEFORE_REUSE,
  EARLY_RETURN,
  DIVERGENT_BARRIER,
  WRONG_FRAGMENT,
  ACCUMULATORS_NOT_ZEROED,
  COPIES_NOT_AWAITED,
  NO_SYNCWARP,
  MISALIGNED_ROW,
  COPY_PAST_SHARED_MEMORY,
  STORE_PAST_SHARED_MEMORY,
  BLOCKS_SHARE_AN_OUTPUT,
  SHUFFLE_OUTSIDE_THE_MASK,
  DEPENDS_ON_ORDER,
  MISALIGNED_VECTOR,
  NO_SWIZZLE,
  // pipeline90
  TOO_FEW_BYTES_EXPECTED,
  WRONG_PARITY,
  FULL_NOT_AWAITED,
  EMPTY_NOT_AWAITED,
  RESULT_READ_BEFORE_WAIT,
  BUFFER_RELEASED_BEFORE_WAIT,
  WRONG_K_STEP,
  BARRIER_NOT_INITIALISED,
  REMOTE_ARRIVAL_MISSING,
  EXIT_BEFORE_THE_OTHER_BLOCK,
  DESCRIPTOR_PAST_SHARED_MEMORY,
  DESCRIPTORS_DIFFER,
};

constexpr int D = 64, TILE = 64, CELLS = TILE * D;

// ---- cp.async, ldmatrix, mma: scores[B, N] = Q K^T and order[0] = 1 + the last block's number
__device__ __forceinline__ bf16* cell(bf16* tile, int row, int chunk, int bug) {
  return tile + row * D + (bug == NO_SWIZZLE ? chunk : chunk ^ (row & 7)) * 8;
}

__global__ void __launch_bounds__(128)
    pipeline80(const bf16* q, const bf16* k, float* scores, float* sums, int* order, int B, int N, int bug) {
  DYN_SMEM(smem);
  bf16 *sq = reinterpret_cast<bf16*>(smem), *sk = sq + CELLS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tiles = (N + TILE - 1) / TILE;
  auto load = [&](bf16* tile, const bf16* from, int row0, int rows) {
    for (int i = threadIdx.x; i < CELLS / 8; i += 128) {
      const int row = row0 + i / 8;
      const bool inside = row < rows + (bug == READS_PAST_THE_END);
      if (!inside && bug == TAIL_LEFT_UNINITIALISED) continue;
      cp_async16(cell(tile, i / 8, i % 8, bug), inside ? from + row * D + i % 8 * 8 : from, inside ? 16 : 0);
    }
  };
  load(sq, q, blockIdx.x * TILE, B);
  load(sk, k, 0, N);
  cp_async_commit();
  uint32_t fq[D / 16][4];
  float sum[2] = {};
  for (int n = 0; n < tiles; ++n) {
    if (n + 1 < tiles) load(sk + (n + 1) % 2 * CELLS, k, (n + 1) * TILE, N);
    cp_async_commit();
    if (bug == WAITS_FOR_TOO_FEW_GROUPS)
      cp_async_wait<2>();
    else
      cp_async_wait<1>();
    if (bug != NO_BARRIER_AFTER_WAIT) __syncthreads();
    bf16* tile = sk + n % 2 * CELLS;
    float s[TILE / 8][4];
    for (auto& column : s)
      for (float& v : column)
        if (bug != ACCUMULATORS_NOT_ZEROED) v = 0;
    for (int kk = 0; kk < D / 16; ++kk) {
      const int shift = bug == MISALIGNED_ROW ? 4 : 0;
      if (n == 0) ldmatrix_x4<false>(fq[kk], cell(sq, warp * 16 + lane % 16, kk * 2 + lane / 16, bug) + shift);
      for (int j = 0; j < TILE / 16; ++j) {
        uint32_t b[4];
        ldmatrix_x4<false>(b, cell(tile, j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2, bug));
        const bool wrong = bug == WRONG_FRAGMENT;
        const uint32_t low[2] = {b[0], b[wrong ? 2 : 1]}, high[2] = {b[wrong ? 1 : 2], b[3]};
        mma_m16n8k16<bf16>(s[2 * j], fq[kk], low);
        mma_m16n8k16<bf16>(s[2 * j + 1], fq[kk], high);
      }
    }
    for (int j = 0; j < TILE / 8; ++j)
      for (int i = 0; i < 4; ++i) {
        const int row = blockIdx.x * TILE + warp * 16 + g + i / 2 * 8, column = n * TILE + j * 8 + t * 2 + i % 2;
        if (row < B && column < N) scores[row * N + column] = s[j][i];
        sum[i / 2] += s[j][i];  // columns past N are zero
      }
    if (bug == EARLY_RETURN && blockIdx.x * TILE + warp * 16 + 16 > unsigned(B)) {
      cp_async_wait<0>();
      return;
    }
    if (bug != NO_BARRIER_BEFORE_REUSE) __syncthreads();
  }
  if (bug != COPIES_NOT_AWAITED)
    cp_async_wait<0>();
  else
    load(sk, k, 0, N);
  if (bug == DIVERGENT_BARRIER) {
    if (warp < 2)
      __syncthreads();
    else
      __syncthreads();
  }
  for (int h = 0; h < 2; ++h) {
    if (bug == NO_SYNCWARP) {
      auto* mail = reinterpret_cast<volatile float*>(smem);
      mail[threadIdx.x] = sum[h];
      sum[h] += mail[threadIdx.x ^ 1];
    } else {
      const unsigned mask = bug == SHUFFLE_OUTSIDE_THE_MASK ? 0x7fffffff : ~0u;
      if (mask >> lane & 1) sum[h] += __shfl_xor_sync(mask, sum[h], 1);
      __syncwarp();
    }
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    const int row = blockIdx.x * TILE + warp * 16 + g + h * 8;
    if (row < B && t == 0) sums[bug == BLOCKS_SHARE_AN_OUTPUT ? row % TILE : row] = sum[h];
  }
  if (bug == COPY_PAST_SHARED_MEMORY) cp_async16(sk + 2 * CELLS, q, 16);
  if (bug == STORE_PAST_SHARED_MEMORY) sk[2 * CELLS] = q[0];
  if (bug == MISALIGNED_VECTOR) *reinterpret_cast<float4*>(sums) = *reinterpret_cast<const float4*>(scores + 1);
  if (threadIdx.x == 0) {
    if (bug == DEPENDS_ON_ORDER)
      atomicExch(order, int(blockIdx.x) + 1);
    else
      atomicMax(order, int(blockIdx.x) + 1);
  }
}

// ---- TMA, mbarriers, wgmma, clusters: the same scores; a producer warp and a consumer warpgroup in each of two
// blocks, whose keys, the same for both, are loaded half by each.
constexpr int STAGES = 2;
__global__ void __launch_bounds__(160)
    pipeline90(__grid_const__ TensorMap q, __grid_const__ TensorMap k, float* scores, int B, int N, int bug) {
  DYN_SMEM(smem);
  bf16 *sq = reinterpret_cast<bf16*>(smem), *sk = sq + CELLS;
  auto* full = reinterpret_cast<uint64_t*>(sk + STAGES * CELLS);
  uint64_t *empty = full + STAGES, *ready = empty + STAGES;
  const int rank = cluster_rank(), tiles = (N + TILE - 1) / TILE;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      mbar_init(&full[s], 1);
      mbar_init(&empty[s], 2);  // a consumer warpgroup of each block
    }
    if (bug != BARRIER_NOT_INITIALISED) mbar_init(ready, 1);
    fence_mbar_init();
  }
  cluster_sync();
  if (threadIdx.x == 128) {
    mbar_arrive_expect(ready, CELLS * 2);
    tensor_copy(sq, q, 0, blockIdx.x * TILE, ready);
    for (int n = 0; n < tiles; ++n) {
      const int s = n % STAGES;
      if (n >= STAGES && bug != EMPTY_NOT_AWAITED) mbar_wait_cluster(&empty[s], (n / STAGES - 1) % 2);
      mbar_arrive_expect(&full[s], CELLS * 2 - (bug == TOO_FEW_BYTES_EXPECTED) * 16);
      tensor_copy_multicast(sk + s * CELLS + rank * CELLS / 2, k, 0, n * TILE + rank * TILE / 2, &full[s], 3);
    }
  }
  if (threadIdx.x < 128) {
    const int lane = threadIdx.x % 32, row = blockIdx.x * TILE + threadIdx.x / 32 * 16 + lane / 4;
    mbar_wait(ready, 0);
    for (int n = 0; n < tiles; ++n) {
      const int s = n % STAGES;
      if (bug != FULL_NOT_AWAITED) mbar_wait(&full[s], (n / STAGES + (bug == WRONG_PARITY)) % 2);
      float d[TILE / 2];
      wgmma_fence();
      for (int kk = 0; kk < D / 16; ++kk) {
        int byte = kk * (bug == WRONG_K_STEP ? 16 : 32);
        if (bug == DESCRIPTOR_PAST_SHARED_MEMORY) byte += STAGES * CELLS * 2;
        if (bug == DESCRIPTORS_DIFFER) byte += threadIdx.x / 64 * 32;
        wgmma_ss<bf16>(d, desc128(sq, kk * 32), desc128(sk + s * CELLS, byte), kk > 0);
      }
      wgmma_commit();
      auto release = [&] {
        bar_sync(1, 128);
        if (threadIdx.x == 0) {
          mbar_arrive(&empty[s]);
          if (bug != REMOTE_ARRIVAL_MISSING) mbar_free_remote(&empty[s], rank ^ 1);
        }
      };
      if (bug == BUFFER_RELEASED_BEFORE_WAIT) release();
      if (bug != RESULT_READ_BEFORE_WAIT) wgmma_wait<0>();
      if (bug != BUFFER_RELEASED_BEFORE_WAIT) release();
      for (int i = 0; i < TILE / 2; ++i) {
        const int r = row + i / 2 % 2 * 8, column = n * TILE + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (r < B && column < N) scores[r * N + column] = d[i];
      }
      if (bug == RESULT_READ_BEFORE_WAIT) wgmma_wait<0>();
    }
  }
  if (bug != EXIT_BEFORE_THE_OTHER_BLOCK) cluster_sync();
}

constexpr int B = 120, N = 200;

static void check_scores(const std::vector<float>& scores, const std::vector<bf16>& q, const std::vector<bf16>& k) {
  for (int i = 0; i < B; ++i)
    for (int j = 0; j < N; ++j) {
      double truth = 0;
      for (int d = 0; d < D; ++d) truth += double(float(q[i * D + d])) * double(float(k[j * D + d]));
      expect_close(scores[i * N + j], truth, 1e-4, "scores", i, j);
    }
}
static void run80(int bug) {
  const auto q = normal<bf16>(B * D, 1), k = normal<bf16>(N * D, 2);
  const Buffer<bf16> dq(q), dk(k);
  const Buffer<float> scores(B * N), sums(B);
  const Buffer<int> order(std::vector<int>{0});
  launch(pipeline80, 2, 128, 3 * CELLS * 2, nullptr, dq.data(), dk.data(), scores.data(), sums.data(), order.data(), B,
         N, bug);
  check_scores(same_bits(scores), q, k);
  const auto out = same_bits(sums), all = same_bits(scores);
  for (int i = 0; i < B; ++i) {
    double truth = 0;
    for (int j = 0; j < N; ++j) truth += all[i * N + j];
    expect_close(out[i], truth, 1e-3, "sums", i);
  }
  same_bits(order);
}
static void run90(int bug) {
  allow_hopper();
  const auto q = normal<bf16>(B * D, 1), k = normal<bf16>(N * D, 2);
  const Buffer<bf16> dq(q), dk(k);
  const Buffer<float> scores(B * N);
  const auto mq = make_tensor_map(dq.data(), B, D, TILE, 64, D), mk = make_tensor_map(dk.data(), N, D, TILE / 2, 64, D);
  const size_t smem = (1 + STAGES) * CELLS * 2 + (2 * STAGES + 1) * 8;
  launch_cluster(2, pipeline90, 2, 160, smem, nullptr, mq, mk, scores.data(), B, N, bug);
  check_scores(same_bits(scores), q, k);
}

#define MUTANT(run, name) \
  DEVICE_TEST(run##_##name) { run(name); }
MUTANT(run80, NONE)
MUTANT(run80, NO_BARRIER_AFTER_WAIT)
MUTANT(run80, WAITS_FOR_TOO_FEW_GROUPS)
MUTANT(run80, READS_PAST_THE_END)
MUTANT(run80, TAIL_LEFT_UNINITIALISED)
MUTANT(run80, NO_BARRIER_BEFORE_REUSE)
MUTANT(run80, EARLY_RETURN)
MUTANT(run80, DIVERGENT_BARRIER)
MUTANT(run80, WRONG_FRAGMENT)
MUTANT(run80, ACCUMULATORS_NOT_ZEROED)
MUTANT(run80, COPIES_NOT_AWAITED)
MUTANT(run80, NO_SYNCWARP)
MUTANT(run80, MISALIGNED_ROW)
MUTANT(run80, COPY_PAST_SHARED_MEMORY)
MUTANT(run80, STORE_PAST_SHARED_MEMORY)
MUTANT(run80, BLOCKS_SHARE_AN_OUTPUT)
MUTANT(run80, SHUFFLE_OUTSIDE_THE_MASK)
MUTANT(run80, DEPENDS_ON_ORDER)
MUTANT(run80, MISALIGNED_VECTOR)
MUTANT(run80, NO_SWIZZLE)
MUTANT(run90, NONE)
MUTANT(run90, TOO_FEW_BYTES_EXPECTED)
MUTANT(run90, WRONG_PARITY)
MUTANT(run90, FULL_NOT_AWAITED)
MUTANT(run90, EMPTY_NOT_AWAITED)
MUTANT(run90, RESULT_READ_BEFORE_WAIT)
MUTANT(run90, BUFFER_RELEASED_BEFORE_WAIT)
MUTANT(run90, WRONG_K_STEP)
MUTANT(run90, BARRIER_NOT_INITIALISED)
MUTANT(run90, REMOTE_ARRIVAL_MISSING)
MUTANT(run90, EXIT_BEFORE_THE_OTHER_BLOCK)
MUTANT(run90, DESCRIPTOR_PAST_SHARED_MEMORY)
MUTANT(run90, DESCRIPTORS_DIFFER)
