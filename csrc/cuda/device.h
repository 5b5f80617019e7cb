// What a kernel's source needs of its compiler: nvcc for the GPU, or a C++ compiler with tests/emulator/cuda_on_cpu.h,
// where every CUDA thread is a fiber. Rules that a kernel follows to compile with both: tests/emulator/README.md.
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#ifdef __CUDACC__
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

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

constexpr unsigned kAllLanes = ~0u;  // of a warp

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

#if CUDA_ON_CPU
#define DRIVER_FUNCTION(name, version) name
#else
// A function of the driver, as it was in CUDA 2.0 (2000) and so on. The module links no driver: it imports without one.
template <class Function>
Function driver_function(const char* name, unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check(cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableDefault, &result), name);
  if (!found) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
  return reinterpret_cast<Function>(found);
}
#define DRIVER_FUNCTION(name, version) driver_function<PFN_##name##_v##version>(#name, version)
#endif

// A block gets at most 48 KiB of dynamic shared memory unless its kernel is allowed more. The allowance belongs to
// kernel and device, not to a launch: it is raised once, to all that a block may have, so that threads that launch the
// kernel with different sizes cannot take it from each other.
inline void allow_shared_memory(const void* kernel, size_t smem) {
  if (smem <= 48 << 10) return;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device attribute");
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int& known = allowed[{kernel, device}];
  if (known == most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  known = most;
}

// What a launch that fails says.
inline void check_launch(cudaError_t status, const void* kernel, int cluster, dim3 grid, dim3 block, size_t smem) {
  if (status == cudaSuccess) return;
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) != cudaSuccess || !name) name = "a kernel";
  auto size = [](dim3 d) { return std::to_string(d.x) + "x" + std::to_string(d.y) + "x" + std::to_string(d.z); };
  throw std::runtime_error("launch of " + std::string(name) + ": " + cudaGetErrorString(status) + " (CUDA error " +
                           std::to_string(static_cast<int>(status)) + "); grid " + size(grid) + " in clusters of " +
                           std::to_string(cluster) + ", blocks of " + size(block) + " threads and " +
                           std::to_string(smem) + " bytes of shared memory");
}

// kernel<<<grid, block, smem, stream>>>(args...) in clusters of `cluster` blocks along x; throws when the launch fails.
template <class... P, class... A>
void launch_cluster(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  const void* const symbol = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(symbol, smem);
#if CUDA_ON_CPU
  (void)stream;
  if (emu::recorder) return emu::recorder(symbol, block, smem);
  check_launch(emu::refusal(symbol, cluster, grid, block, smem), symbol, cluster, grid, block, smem);
  emu::launch(cluster, grid, block, smem, [=] { kernel(static_cast<P>(args)...); });
#else
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {grid, block, smem, static_cast<cudaStream_t>(stream), &attribute, cluster > 1 ? 1u : 0u};
  check_launch(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...), symbol, cluster, grid, block, smem);
#endif
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, void* stream, A... args) {
  launch_cluster(1, kernel, grid, block, smem, stream, args...);
}

}  // namespace fastcompat::cuda
