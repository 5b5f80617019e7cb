// Hopper's instructions (sm_90a): mbarriers, bulk and tensor copies, wgmma. PTX on the GPU, tests/emulator on the CPU.
#pragma once
#include "ops80.h"
#if CUDA_ON_CPU
#include "ops90_on_cpu.h"
#endif

namespace fastcompat::cuda {

// ---- a matrix in global memory, as the tensor copy engine sees it
#if CUDA_ON_CPU
#define __grid_const__
using TensorMap = emu::TensorMap;
#else
#define __grid_const__ const __grid_constant__
using TensorMap = CUtensorMap;
#endif

// Rows of T (bf16 or fp16), `stride` elements apart, copied in boxes of box_rows (up to 256) x 64 elements that lie in
// shared memory with the 128-byte swizzle; elements outside the matrix arrive as zero. data and stride * 2 bytes must
// be multiples of 16.
template <class T>
TensorMap make_tensor_map(const T* data, int64_t rows, int64_t cols, int box_rows, int box_cols, int64_t stride) {
#if CUDA_ON_CPU
  return emu::make_tensor_map(data, rows, cols, box_rows, box_cols, stride);
#else
  static const auto encode = DRIVER_FUNCTION(cuTensorMapEncodeTiled, 12000);
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
  TensorMap map;
  const CUresult status =
      encode(&map, std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<T*>(data), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(static_cast<int>(status)) +
                             " for " + std::to_string(rows) + " rows of " + std::to_string(cols) + ", " +
                             std::to_string(stride) + " apart, in boxes of " + std::to_string(box_rows) + " x " +
                             std::to_string(box_cols));
  return map;
#endif
}

// ---- mbarriers: a phase ends when all arrivals and all expected bytes have come
__device__ __forceinline__ void mbar_init(uint64_t* bar, int arrivals CALLER) {
#if CUDA_ON_CPU
  emu::mbar_init(bar, arrivals, caller);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(arrivals) : "memory");
#endif
}

// After mbar_init, before the barrier that lets others use it; also for the blocks of the cluster.
__device__ __forceinline__ void fence_mbar_init() {
#if !CUDA_ON_CPU
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Makes plain writes to shared memory visible to wgmma and bulk copies; a barrier follows.
__device__ __forceinline__ void fence_proxy_async() {
#if !CUDA_ON_CPU
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbar_arrive(uint64_t* bar CALLER) {
#if CUDA_ON_CPU
  emu::mbar_arrive(bar, 0, caller);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
#endif
}

// One arrival, and so many bytes to come.
__device__ __forceinline__ void mbar_arrive_expect(uint64_t* bar, int bytes CALLER) {
#if CUDA_ON_CPU
  emu::mbar_arrive(bar, bytes, caller);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes) : "memory");
#endif
}

// Arrives at the barrier in the same place of another block of the cluster, to give a buffer back: without a fence,
// since nothing was written that the other block reads.
__device__ __forceinline__ void mbar_free_remote(uint64_t* bar, int rank CALLER) {
#if CUDA_ON_CPU
  emu::mbar_arrive_remote(bar, rank, caller);
#else
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_addr(bar)),
      "r"(rank)
      : "memory");
#endif
}

// Until the phase of this parity has ended; the first phase has parity 0.
__device__ __forceinline__ void mbar_wait(uint64_t* bar, int parity CALLER) {
#if CUDA_ON_CPU
  emu::mbar_wait(bar, parity, caller);
#else
  asm volatile(
      "{\n.reg .pred done;\nagain_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n}" ::"r"(smem_addr(bar)),
      "r"(parity)
      : "memory");
#endif
}

// The same where the arrivals come from other blocks of the cluster.
__device__ __forceinline__ void mbar_wait_cluster(uint64_t* bar, int parity CALLER) {
#if CUDA_ON_CPU
  emu::mbar_wait(bar, parity, caller);
#else
  asm volatile(
      "{\n.reg .pred done;\nagain_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n}" ::"r"(smem_addr(bar)),
      "r"(parity)
      : "memory");
#endif
}

// ---- tensor copies by one thread; their bytes arrive at bar
// One box whose first element is (row, col); dst is 1024-byte aligned.
template <class T>
__device__ __forceinline__ void tensor_copy(T* dst, const TensorMap& map, int col, int row, uint64_t* bar CALLER) {
#if CUDA_ON_CPU
  emu::tensor_copy(dst, map, col, row, bar, 1u << emu::self().block->rank, caller);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          smem_addr(dst)),
      "l"(&map), "r"(col), "r"(row), "r"(smem_addr(bar))
      : "memory");
#endif
}

// The same into the same place of every block of the cluster whose bit is set, at each one's own bar.
template <class T>
__device__ __forceinline__ void tensor_copy_multicast(T* dst, const TensorMap& map, int col, int row, uint64_t* bar,
                                                      unsigned blocks CALLER) {
#if CUDA_ON_CPU
  emu::tensor_copy(dst, map, col, row, bar, blocks, caller);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem_addr(dst)),
      "l"(&map), "r"(col), "r"(row), "r"(smem_addr(bar)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
#endif
}

// ---- warp roles
// Registers per thread, up or down, for a whole warpgroup; a multiple of 8.
template <int N>
__device__ __forceinline__ void registers_up() {
#if !CUDA_ON_CPU
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
__device__ __forceinline__ void registers_down() {
#if !CUDA_ON_CPU
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// Named barrier 1..15 (0 is __syncthreads) of `threads` threads.
__device__ __forceinline__ void bar_sync(int id, int threads CALLER) {
#if CUDA_ON_CPU
  emu::named_barrier(id, threads, caller);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ int cluster_rank() {
#if CUDA_ON_CPU
  return emu::self().block->rank;
#else
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// All threads of all blocks of the cluster. A block stays until no other can still reach into it.
__device__ __forceinline__ void cluster_sync(CALLER_ONLY) {
#if CUDA_ON_CPU
  emu::cluster_sync(caller);
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// ---- wgmma: D[64, N] (+)= A[64, 16] B[16, N] by the 128 threads of a warpgroup, asynchronously
// A tile of 64 elements (128 bytes, swizzled) per row, 1024-byte aligned, `byte` from its start. K-major (K runs along
// the row): step k starts at byte 32k. MN-major (for the _t forms, N runs along the row): step k starts at byte 2048k,
// and panels of 64 columns are `panel` bytes apart.
__device__ __forceinline__ uint64_t desc128(const void* tile, int byte, int panel = 16) {
  return uint64_t((smem_addr(tile) + byte) >> 4 & 0x3fff) | uint64_t(panel >> 4 & 0x3fff) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// Before the first wgmma, and whenever registers that it reads or adds to were touched otherwise.
__device__ __forceinline__ void wgmma_fence(CALLER_ONLY) {
#if CUDA_ON_CPU
  emu::wgmma_fence(caller);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit(CALLER_ONLY) {
#if CUDA_ON_CPU
  emu::wgmma_commit(caller);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int N>
__device__ __forceinline__ void wgmma_wait(CALLER_ONLY) {
#if CUDA_ON_CPU
  emu::wgmma_wait(N, caller);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}
// Keeps the compiler from moving uses of accumulators across this point.
template <int R>
__device__ __forceinline__ void hold(float (&d)[R]) {
#if !CUDA_ON_CPU
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  (void)d;
#endif
}

#if !CUDA_ON_CPU
// One struct per number of columns: its accumulators as asm operands, then A (descriptor or registers), B, accumulate.
#define WGMMA_R8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define WGMMA_R32 WGMMA_R8(0), WGMMA_R8(8), WGMMA_R8(16), WGMMA_R8(24)
#define WGMMA_R40 WGMMA_R32, WGMMA_R8(32)
#define WGMMA_R48 WGMMA_R40, WGMMA_R8(40)
#define WGMMA_R64 WGMMA_R48, WGMMA_R8(48), WGMMA_R8(56)
#define WGMMA_R80 WGMMA_R64, WGMMA_R8(64), WGMMA_R8(72)
#define WGMMA_R88 WGMMA_R80, WGMMA_R8(80)
#define WGMMA_R96 WGMMA_R88, WGMMA_R8(88)
#define WGMMA_R128 WGMMA_R96, WGMMA_R8(96), WGMMA_R8(104), WGMMA_R8(112), WGMMA_R8(120)
#define WGMMA_P32                                                                                                      \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define WGMMA_P40 WGMMA_P32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define WGMMA_P48 WGMMA_P40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_P64 WGMMA_P48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_P80 WGMMA_P64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WGMMA_P88 WGMMA_P80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define WGMMA_P96 WGMMA_P88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_P128                                                                                                    \
  WGMMA_P96                                                                                                           \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%" \
  "119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_SS(N, R, TYPES, a0, b0, acc0, tb0)                                                       \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #acc0 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
               "k16.f32." TYPES " {" WGMMA_P##R "}, %" #a0 ", %" #b0 ", p, 1, 1, 0, %" #tb0 ";\n}"     \
               : WGMMA_R##R                                                                            \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSED))
#define WGMMA_RS(N, R, TYPES, a0, a1, a2, a3, b0, acc0, tb0)                                                   \
  asm volatile(                                                                                                \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #acc0 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPES \
      " {" WGMMA_P##R "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b0 ", p, 1, 1, %" #tb0 ";\n}"             \
      : WGMMA_R##R                                                                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(TRANSPOSED))
template <int R>
struct Wgmma;
#define WGMMA_SHAPE(N, R, i0, i1, i2, i3, i4, i5, i6)                                                               \
  template <>                                                                                                       \
  struct Wgmma<R> {                                                                                                 \
    template <class T, int TRANSPOSED>                                                                              \
    static __device__ __forceinline__ void ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {             \
      if constexpr (std::is_same_v<T, bf16>)                                                                        \
        WGMMA_SS(N, R, "bf16.bf16", i0, i1, i2, i3);                                                                \
      else                                                                                                          \
        WGMMA_SS(N, R, "f16.f16", i0, i1, i2, i3);                                                                  \
    }                                                                                                               \
    template <class T, int TRANSPOSED>                                                                              \
    static __device__ __forceinline__ void rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      if constexpr (std::is_same_v<T, bf16>)                                                                        \
        WGMMA_RS(N, R, "bf16.bf16", i0, i1, i2, i3, i4, i5, i6);                                                    \
      else                                                                                                          \
        WGMMA_RS(N, R, "f16.f16", i0, i1, i2, i3, i4, i5, i6);                                                      \
    }                                                                                                               \
  };
WGMMA_SHAPE(64, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA_SHAPE(80, 40, 40, 41, 42, 43, 44, 45, 46)
WGMMA_SHAPE(128, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA_SHAPE(160, 80, 80, 81, 82, 83, 84, 85, 86)
WGMMA_SHAPE(192, 96, 96, 97, 98, 99, 100, 101, 102)
WGMMA_SHAPE(256, 128, 128, 129, 130, 131, 132, 133, 134)
#endif

// d[R] holds N = 2R columns: d[4j + 2h + i] is row 16 * warp + lane / 4 + 8h, column 8j + lane % 4 * 2 + i. A register
// of a[4] holds what mma_m16n8k16's does. _t: B is MN-major. accumulate = false starts from zero.
#if CUDA_ON_CPU
#define WGMMA(kind, transposed)                                                \
  static_assert(R % 4 == 0 && R <= 128, "columns: a multiple of 8 up to 256"); \
  emu::wgmma(emu::half_type<T>, d, 2 * R, emu::operand(a), b, accumulate, transposed, caller)
#else
#define WGMMA(kind, transposed) Wgmma<R>::template kind<T, transposed>(d, a, b, accumulate)
#endif
template <class T = bf16, int R>
__device__ __forceinline__ void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate CALLER) {
  WGMMA(ss, 0);
}
template <class T = bf16, int R>
__device__ __forceinline__ void wgmma_ss_t(float (&d)[R], uint64_t a, uint64_t b, bool accumulate CALLER) {
  WGMMA(ss, 1);
}
template <class T = bf16, int R>
__device__ __forceinline__ void wgmma_rs_t(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate CALLER) {
  WGMMA(rs, 1);
}
#undef WGMMA

}  // namespace fastcompat::cuda
