// Every instruction of csrc/cuda/ops80.h and ops90.h by itself, against what the PTX manual says of its fragments. On a
// GPU the same file tests the hardware, and so the emulator's picture of it. Small integers: products are exact.
#include "device_test.h"
#include "ops90.h"

using namespace fastcompat::cuda;
using namespace device_test;

template <class T>
static std::vector<T> integers(size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> out(size);
  for (T& v : out) v = T(float(int(random() % 17) - 8));
  return out;
}
// a [M, K] times b [N, K] transposed, or b [K, N] as it is
template <class T>
static std::vector<float> product(const std::vector<T>& a, const std::vector<T>& b, int M, int N, int K, bool b_is_kn) {
  std::vector<float> out(M * N);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j)
      for (int k = 0; k < K; ++k) out[i * N + j] += float(a[i * K + k]) * float(b_is_kn ? b[k * N + j] : b[j * K + k]);
  return out;
}
static void expect_same(const std::vector<float>& got, const std::vector<float>& truth, const char* what) {
  for (size_t i = 0; i < truth.size(); ++i) expect_close(got[i], truth[i], 0, what, i);
}

// ---- mma: fragments straight from memory, as the manual numbers them
template <class T>
__global__ void mma_kernel(const T* a, const T* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  auto two = [](const T* p, int stride) { return pack<T>(float(p[0]), float(p[stride])); };
  const uint32_t fa[4] = {two(a + g * 16 + t * 2, 1), two(a + (g + 8) * 16 + t * 2, 1), two(a + g * 16 + t * 2 + 8, 1),
                          two(a + (g + 8) * 16 + t * 2 + 8, 1)};
  const uint32_t fb[2] = {two(b + t * 2 * 8 + g, 8), two(b + (t * 2 + 8) * 8 + g, 8)};  // b [16, 8]
  float fd[4] = {1, 2, 3, 4};
  mma_m16n8k16<T>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = fd[i] - float(i + 1);
}
template <class T>
static void mma() {
  const auto a = integers<T>(16 * 16, 1), b = integers<T>(16 * 8, 2);
  const Buffer<T> da(a), db(b);
  const Buffer<float> d(16 * 8);
  launch(mma_kernel<T>, 1, 32, 0, nullptr, da.data(), db.data(), d.data());
  expect_same(same_bits(d), product(a, b, 16, 8, 16, true), "mma");
}
DEVICE_TEST(mma_bf16) { mma<bf16>(); }
DEVICE_TEST(mma_fp16) { mma<fp16>(); }

// ---- cp.async with tails, ldmatrix
__global__ void copy_kernel(const uint16_t* from, uint16_t* to, uint32_t* plain, uint32_t* transposed) {
  DYN_SMEM(smem);
  auto* tile = reinterpret_cast<uint16_t*>(smem);  // [32, 8]
  const int lane = threadIdx.x;
  cp_async16(tile + lane * 8, from + lane * 8, lane % 9 * 2);
  cp_async_commit();
  cp_async4(tile + 256 + lane * 2, from + lane * 2, lane % 3 * 2);
  cp_async_commit();
  cp_async_wait<1>();
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4<false>(r, tile + lane * 8);
  for (int m = 0; m < 4; ++m) plain[m * 32 + lane] = r[m];
  ldmatrix_x4<true>(r, tile + lane * 8);
  for (int m = 0; m < 4; ++m) transposed[m * 32 + lane] = r[m];
  cp_async_wait<0>();
  __syncwarp();
  for (int i = lane; i < 320; i += 32) to[i] = tile[i];
}
DEVICE_TEST(copies_and_ldmatrix) {
  std::vector<uint16_t> from(256), tile(320);
  for (int i = 0; i < 256; ++i) from[i] = uint16_t(i + 1);
  for (int i = 0; i < 256; ++i) tile[i] = i % 8 < i / 8 % 9 ? from[i] : 0;
  for (int i = 0; i < 64; ++i) tile[256 + i] = i % 2 < i / 2 % 3 ? from[i] : 0;
  const Buffer<uint16_t> dfrom(from), to(320);
  const Buffer<uint32_t> plain(128), transposed(128);
  launch(copy_kernel, 1, 32, 640, nullptr, dfrom.data(), to.data(), plain.data(), transposed.data());
  const auto got = same_bits(to);
  for (int i = 0; i < 320; ++i) expect(got[i] == tile[i], "copied[%d] is %d, not %d", i, got[i], tile[i]);
  const auto p = same_bits(plain), t = same_bits(transposed);
  for (int m = 0; m < 4; ++m)
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, c = lane % 4 * 2;
      auto at = [&](int row, int column) -> uint32_t { return tile[(m * 8 + row) * 8 + column]; };
      expect(p[m * 32 + lane] == (at(g, c) | at(g, c + 1) << 16), "ldmatrix, matrix %d lane %d", m, lane);
      expect(t[m * 32 + lane] == (at(c, g) | at(c + 1, g) << 16), "ldmatrix.trans, matrix %d lane %d", m, lane);
    }
}

// ---- wgmma, all shapes: out[64, N] = A[64, 64] B, A by TMA or in registers, B [N, 64] or (TRANS) [64, N]
template <class T, int N, bool REGISTERS, bool TRANS>
__global__ void __launch_bounds__(128)
    wgmma_kernel(__grid_const__ TensorMap a, __grid_const__ TensorMap b, const T* rows, float* out) {
  DYN_SMEM(smem);
  T *sa = reinterpret_cast<T*>(smem), *sb = sa + 64 * 64;
  constexpr int PANELS = TRANS ? (N + 63) / 64 : 1, PANEL = TRANS ? 64 * 64 : N * 64;
  auto* bar = reinterpret_cast<uint64_t*>(sb + PANELS * PANEL);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    fence_mbar_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbar_arrive_expect(bar, (64 * 64 + PANELS * PANEL) * 2);
    tensor_copy(sa, a, 0, 0, bar);
    for (int p = 0; p < PANELS; ++p) tensor_copy(sb + p * PANEL, b, p * 64, 0, bar);
  }
  mbar_wait(bar, 0);
  uint32_t fa[4][4];
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 4; ++i) {
      const T* p = rows + (warp * 16 + g + i % 2 * 8) * 64 + k * 16 + t * 2 + i / 2 * 8;
      fa[k][i] = pack<T>(float(p[0]), float(p[1]));
    }
  float d[N / 2];
  hold(d);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint64_t da = desc128(sa, k * 32), db = TRANS ? desc128(sb, k * 2048, PANEL * 2) : desc128(sb, k * 32);
    if constexpr (REGISTERS && TRANS) wgmma_rs_t<T>(d, fa[k], db, k > 0);
    if constexpr (!REGISTERS && TRANS) wgmma_ss_t<T>(d, da, db, k > 0);
    if constexpr (!REGISTERS && !TRANS) wgmma_ss<T>(d, da, db, k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(d);
  for (int i = 0; i < N / 2; ++i) out[(warp * 16 + g + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2] = d[i];
}
template <class T, int N, bool REGISTERS, bool TRANS>
static void one_wgmma() {
  allow_hopper();
  const auto a = integers<T>(64 * 64, 3), b = integers<T>(64 * N, 4);
  const Buffer<T> da(a), db(b);
  const Buffer<float> out(64 * N);
  const auto ma = make_tensor_map(da.data(), 64, 64, 64, 64, 64);
  const auto mb = TRANS ? make_tensor_map(db.data(), 64, N, 64, 64, N) : make_tensor_map(db.data(), N, 64, N, 64, 64);
  const size_t smem = (64 * 64 + (TRANS ? (N + 63) / 64 * 64 * 64 : N * 64)) * 2 + 8;
  launch(wgmma_kernel<T, N, REGISTERS, TRANS>, 1, 128, smem, nullptr, ma, mb, da.data(), out.data());
  expect_same(same_bits(out), product(a, b, 64, N, 64, TRANS), "wgmma");
}
template <class T, int N>
static void wgmma_shape() {
  one_wgmma<T, N, false, false>();
  one_wgmma<T, N, false, true>();
  one_wgmma<T, N, true, true>();
}
DEVICE_TEST(wgmma_bf16) {
  wgmma_shape<bf16, 64>();
  wgmma_shape<bf16, 80>();
  wgmma_shape<bf16, 128>();
  wgmma_shape<bf16, 160>();
  wgmma_shape<bf16, 192>();
  wgmma_shape<bf16, 256>();
}
DEVICE_TEST(wgmma_fp16) {
  wgmma_shape<fp16, 64>();
  wgmma_shape<fp16, 256>();
}

// ---- named barriers, a cluster: block r of 2 sends its rows to both blocks, which store the rows of both
__global__ void __launch_bounds__(64) cluster_kernel(__grid_const__ TensorMap from, uint16_t* to) {
  DYN_SMEM(smem);
  auto* tile = reinterpret_cast<uint16_t*>(smem);  // 2 boxes of 8 x 64
  auto* bar = reinterpret_cast<uint64_t*>(tile + 2 * 512);
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    mbar_init(bar, 1);
    mbar_init(bar + 1, 2);
    fence_mbar_init();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mbar_arrive_expect(bar, 2 * 512 * 2);
    tensor_copy_multicast(tile + rank * 512, from, 0, rank * 8 - 4, bar, 3);
  }
  mbar_wait(bar, 0);
  for (int i = threadIdx.x; i < 1024; i += 64) to[rank * 1024 + i] = tile[i];
  bar_sync(1, 64);
  if (threadIdx.x == 63) {
    mbar_arrive(bar + 1);
    mbar_free_remote(bar + 1, rank ^ 1);
  }
  mbar_wait_cluster(bar + 1, 0);
  cluster_sync();
}
DEVICE_TEST(clusters) {
  allow_hopper();
  std::vector<uint16_t> matrix(10 * 48);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = uint16_t(i + 1);
  const Buffer<uint16_t> dmatrix(matrix), to(2 * 1024);
  const auto map = make_tensor_map(reinterpret_cast<const bf16*>(dmatrix.data()), 10, 40, 8, 64, 48);
  launch_cluster(2, cluster_kernel, 2, 64, 2048 + 16, nullptr, map, to.data());
  const auto got = same_bits(to);
  for (int block = 0; block < 2; ++block)
    for (int i = 0; i < 1024; ++i) {
      // Boxes start at rows -4 and 4; 128-byte swizzle: 16-byte chunks change places within 8 rows.
      const int row = i / 512 * 8 - 4 + i / 64 % 8, column = (i / 8 % 8 ^ i / 64 % 8) * 8 + i % 8;
      const int truth = row >= 0 && row < 10 && column < 40 ? matrix[row * 48 + column] : 0;
      expect(got[block * 1024 + i] == truth, "block %d element %d is %d, not %d", block, i, got[block * 1024 + i],
             truth);
    }
}
