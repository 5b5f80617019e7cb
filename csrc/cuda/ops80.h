// Tensor-core and asynchronous-copy instructions of sm_80 and newer: PTX on the GPU, tests/emulator on the CPU.
#pragma once
#include <type_traits>

#include "device.h"
#if CUDA_ON_CPU
#include "ops80_on_cpu.h"
#endif

namespace fastcompat::cuda {

// v, but the compiler may not know: what follows from it is computed here, not ahead of the loops around, where it
// would hold a register all the way through.
template <class V>
__device__ __forceinline__ V opaque(V v) {
#if !CUDA_ON_CPU
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Byte address inside the block's shared memory.
__device__ __forceinline__ uint32_t smem_addr(const void* p CALLER) {
#if CUDA_ON_CPU
  return emu::smem_address(p, caller);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#endif
}

// Four 8x8 matrices of 16-bit elements; lane 8m+i names row i of matrix m. Thread (g, t) = (lane/4, lane%4) receives
// elements (g, 2t) and (g, 2t+1) of each, or (2t, g) and (2t+1, g) when TRANS.
template <bool TRANS>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row CALLER) {
#if CUDA_ON_CPU
  emu::ldmatrix_x4(TRANS, r, row, caller);
#else
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(row))
                 : "memory");
#endif
}

// D[16, 8] += A[16, 16] B[16, 8], T = bf16 or fp16, accumulated in fp32. Thread (g, t) holds D (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1); A rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8; B rows 2t, 2t+8 of column g.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] CALLER) {
#if CUDA_ON_CPU
  emu::mma_m16n8k16(emu::half_type<T>, d, a, b, caller);
#else
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// 16 bytes from global to shared memory; the part past `bytes` becomes zero, and bytes = 0 never touches src.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, int bytes CALLER) {
#if CUDA_ON_CPU
  emu::cp_async(dst, src, 16, bytes, caller);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(bytes) : "memory");
#endif
}

// The same for 4 bytes.
__device__ __forceinline__ void cp_async4(void* dst, const void* src, int bytes CALLER) {
#if CUDA_ON_CPU
  emu::cp_async(dst, src, 4, bytes, caller);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_addr(dst)), "l"(src), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if CUDA_ON_CPU
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most N of this thread's newest groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if CUDA_ON_CPU
  emu::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Two floats rounded to T in one register, lo in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  uint32_t u;
  if constexpr (std::is_same_v<T, bf16>) {
    __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    memcpy(&u, &v, 4);
  } else {
    __half2 v = __floats2half2_rn(lo, hi);
    memcpy(&u, &v, 4);
  }
  return u;
}

}  // namespace fastcompat::cuda
