// CUDA's language and the part of its runtime that the project uses, for a C++ compiler: a kernel's source compiles as
// it stands, and emu::launch runs every CUDA thread as a fiber.
#pragma once
#include <cmath>
#include <map>
#include <mutex>
#include <set>

#include "schedules.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
constexpr int warpSize = 32;

using std::max;
using std::min;
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
template <class To, class From>
To emu_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}
inline int __float_as_int(float f) { return emu_bits<int>(f); }
inline unsigned __float_as_uint(float f) { return emu_bits<unsigned>(f); }
inline float __int_as_float(int i) { return emu_bits<float>(i); }
inline float __uint_as_float(unsigned i) { return emu_bits<float>(i); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T v) {
  *p = v;
}

// ---- barriers and warp collectives
inline void __syncthreads(emu::Where at = emu::here()) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  emu::meet({&emu::self().block->meetings[emu::BARRIER], 0, threads, true, true}, "__syncthreads", at, nullptr,
            emu::nothing);
}
inline int __syncthreads_or(int predicate, emu::Where at = emu::here()) {
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  int any = predicate != 0;
  emu::meet({&emu::self().block->meetings[emu::BARRIER], 0, threads, true, true}, "__syncthreads_or", at, &any,
            [](const std::vector<emu::Fiber*>& all) {
              int result = 0;
              for (emu::Fiber* f : all) result |= *static_cast<int*>(f->argument);
              for (emu::Fiber* f : all) *static_cast<int*>(f->argument) = result;
            });
  return any;
}
inline void __syncwarp(unsigned mask = ~0u, emu::Where at = emu::here()) {
  emu::warp_meet(mask, "__syncwarp", at, nullptr, emu::nothing, true);
}

namespace emu {
struct Exchange {
  uint64_t in, out;
  int source;
};
inline uint64_t exchange(unsigned mask, uint64_t bits, int source, const char* op, Where at) {
  Exchange x{bits, bits, source};
  warp_meet(mask, op, at, &x, [=](const std::vector<Fiber*>& all) {
    Exchange* lanes[32] = {};
    for (Fiber* f : all) lanes[f->lane] = static_cast<Exchange*>(f->argument);
    for (Exchange* lane : lanes) {
      if (!lane) continue;
      if (!lanes[lane->source & 31]) fail(op, at, "reads a lane outside the mask");
      lane->out = lanes[lane->source & 31]->in;
    }
  });
  return x.out;
}
template <class T>
T shuffle(unsigned mask, T value, int source, const char* op, Where at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "32 or 64 bits");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, op, at);
  memcpy(&value, &bits, sizeof value);
  return value;
}
// Every lane gets fold over the lanes' values.
template <class T>
T reduce(unsigned mask, T value, const char* op, Where at, T (*fold)(T, T)) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4, "32-bit integers");
  struct {
    T in, out;
  } x{value, value};
  using X = decltype(x);
  warp_meet(mask, op, at, &x, [=](const std::vector<Fiber*>& all) {
    T result = static_cast<X*>(all[0]->argument)->in;
    for (size_t i = 1; i < all.size(); ++i) result = fold(result, static_cast<X*>(all[i]->argument)->in);
    for (Fiber* f : all) static_cast<X*>(f->argument)->out = result;
  });
  return x.out;
}
}  // namespace emu
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, emu::Where at = emu::here()) {
  const int lane = emu::self().lane;
  return emu::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, emu::Where at = emu::here()) {
  const int lane = emu::self().lane, source = lane ^ bits;
  return emu::shuffle(mask, v, source / width == lane / width ? source : lane, "__shfl_xor_sync", at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int delta, int width = 32, emu::Where at = emu::here()) {
  const int lane = emu::self().lane;
  return emu::shuffle(mask, v, lane % width + delta < width ? lane + delta : lane, "__shfl_down_sync", at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int delta, int width = 32, emu::Where at = emu::here()) {
  const int lane = emu::self().lane;
  return emu::shuffle(mask, v, lane % width >= delta ? lane - delta : lane, "__shfl_up_sync", at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Where at = emu::here()) {
  return emu::reduce<unsigned>(mask, predicate ? 1u << emu::self().lane : 0u, "__ballot_sync", at,
                               [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, emu::Where at = emu::here()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emu::Where at = emu::here()) {
  return __ballot_sync(mask, predicate, at) == mask;
}
template <class T>
T __reduce_add_sync(unsigned mask, T v, emu::Where at = emu::here()) {
  return emu::reduce<T>(mask, v, "__reduce_add_sync", at, [](T a, T b) { return T(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T v, emu::Where at = emu::here()) {
  return emu::reduce<T>(mask, v, "__reduce_max_sync", at, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, emu::Where at = emu::here()) {
  return emu::reduce<T>(mask, v, "__reduce_min_sync", at, [](T a, T b) { return a < b ? a : b; });
}

// ---- atomics, on integers only: a sum of floats in no fixed order is not deterministic
namespace emu {
template <class T, class Change>
T atomic_change(T* p, Change change) {
  static_assert(std::is_integral<T>::value, "integers only");
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, change(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
struct Same {
  using type = T;
};
template <class T>
using same = typename Same<T>::type;  // takes no part in deduction
}  // namespace emu
template <class T>
T atomicAdd(T* p, emu::same<T> v) {
  return emu::atomic_change(p, [v](T old) { return T(old + v); });
}
template <class T>
T atomicMax(T* p, emu::same<T> v) {
  return emu::atomic_change(p, [v](T old) { return old > v ? old : v; });
}
template <class T>
T atomicMin(T* p, emu::same<T> v) {
  return emu::atomic_change(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
T atomicOr(T* p, emu::same<T> v) {
  return emu::atomic_change(p, [v](T old) { return T(old | v); });
}
template <class T>
T atomicExch(T* p, emu::same<T> v) {
  return emu::atomic_change(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, emu::same<T> expected, emu::same<T> v) {
  return emu::atomic_change(p, [=](T old) { return old == expected ? v : old; });
}
// As in the pattern "write, fence, count up; the block that counts last fences and reads".
inline void __threadfence() {
  emu::release(&emu::machine.fence);
  emu::acquire(&emu::machine.fence);
}
inline void __threadfence_block() { __threadfence(); }

// ---- runtime
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
typedef struct EmuStream* cudaStream_t;
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
namespace emu {
inline int multiprocessors = 4, capability = 80;  // the device that cudaDeviceGetAttribute describes
inline int driver = 13000;                        // the CUDA version that it supports
inline int driver_questions = 0;                  // how often it was asked for
}  // namespace emu
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// ---- contexts: each device has one, which a thread makes current
typedef int CUdevice;
typedef struct EmuContext* CUcontext;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_CONTEXT = 201 };
namespace emu {
inline std::set<int> contexts;                 // devices that have one
inline thread_local std::vector<int> current;  // devices whose context this thread has pushed
}  // namespace emu
inline CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
inline CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  emu::contexts.insert(device);
  return *context = reinterpret_cast<CUcontext>(uintptr_t(device) + 1), CUDA_SUCCESS;
}
inline CUresult cuCtxPushCurrent(CUcontext context) {
  emu::current.push_back(static_cast<int>(reinterpret_cast<uintptr_t>(context) - 1));
  return CUDA_SUCCESS;
}
inline CUresult cuCtxPopCurrent(CUcontext*) {
  if (emu::current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  return emu::current.pop_back(), CUDA_SUCCESS;
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = emu::current.empty() ? 0 : emu::current.back(), cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emu::contexts.insert(device);
  emu::current = {device};
  return cudaSuccess;
}

// ---- a kernel's allowance of shared memory
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
namespace emu {
inline std::map<const void*, int> allowance;
inline int allowances_set = 0;  // how often
inline std::mutex allowance_mutex;
// Why the device does not take a launch.
inline cudaError_t refusal(const void* kernel, int cluster, dim3 grid, dim3 block, size_t smem) {
  const std::lock_guard<std::mutex> lock(allowance_mutex);
  const auto found = allowance.find(kernel);
  const size_t most = found == allowance.end() ? std::min<size_t>(48 << 10, smem_limit) : found->second;
  const size_t threads = size_t(block.x) * block.y * block.z;
  const bool right = smem <= most && threads && threads <= 1024 && grid.x && grid.y && grid.z && grid.y <= 65535 &&
                     grid.z <= 65535 && cluster >= 1 && cluster <= 8 && grid.x % cluster == 0;
  return right ? cudaSuccess : cudaErrorInvalidValue;
}
}  // namespace emu
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(emu::allowance_mutex);
  if (bytes < 0 || size_t(bytes) > emu::smem_limit) return cudaErrorInvalidValue;
  emu::allowance[kernel] = bytes;
  ++emu::allowances_set;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetName(const char** name, const void*) { return *name = "a kernel", cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? emu::multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? emu::capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? emu::capability % 10
                                                            : static_cast<int>(emu::smem_limit);
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  ++emu::driver_questions;
  return *version = emu::driver, cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  void* raw = nullptr;
  if (posix_memalign(&raw, 256, std::max<size_t>(bytes, 1))) return cudaErrorMemoryAllocation;
  memset(raw, 0xff, bytes);
  *p = static_cast<T*>(raw);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  emu::Quiet quiet;
  return free(p), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return memset(p, value, bytes), cudaSuccess;
}
