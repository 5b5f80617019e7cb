// What a kernel's source needs of its compiler: nvcc for the GPU, or a C++ compiler with tests/emulator/cuda_on_cpu.h,
// where every CUDA thread is a fiber. Rules that a kernel follows to compile with both: tests/emulator/README.md.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#define CUDA_ON_CPU 0
// The block's dynamic shared memory, the only shared memory a kernel has, 1024-byte aligned.
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
// The caller's place in the source, for the emulator's reports.
#define CALLER
#define CALLER_ONLY
#else
#define CUDA_ON_CPU 1
#include "cuda_on_cpu.h"
#define DYN_SMEM(name) unsigned char* const name = emu::shared_memory()
#define CALLER , emu::Where caller = emu::here()
#define CALLER_ONLY emu::Where caller = emu::here()
#endif

namespace fastcompat::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// kernel<<<grid, block, smem, stream>>>(args...) in clusters of `cluster` blocks along x; throws when the launch fails.
template <class... P, class... A>
void launch_cluster(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
#if CUDA_ON_CPU
  (void)stream;
  if (emu::recorder) return emu::recorder(reinterpret_cast<const void*>(kernel), block, smem);
  emu::launch(cluster, grid, block, smem, [=] { kernel(static_cast<P>(args)...); });
#else
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)),
        "shared memory");
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {grid, block, smem, static_cast<cudaStream_t>(stream), &attribute, cluster > 1 ? 1u : 0u};
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), "kernel launch");
#endif
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  launch_cluster(1, kernel, grid, block, smem, stream, args...);
}

}  // namespace fastcompat::cuda
