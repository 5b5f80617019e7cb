// The dispatcher: which tier of kernels runs a call, by the device's compute capability and by what a tier covers.
#include "device.h"
#include "engine.h"
#include "search_sm80.h"
#include "softmax_sm80.h"
#include "softmax_sm90.h"
#include "topk_sm90.h"

namespace fastcompat::cuda {
namespace {

int compute_capability(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
}

// Makes the device of a launch the current one for as long as it lives.
class Current {
 public:
  explicit Current(const Launch& launch) {
    check(cudaGetDevice(&before_), "current device");
    if (before_ != launch.device) check(cudaSetDevice(launch.device), "device");
  }
  ~Current() { cudaSetDevice(before_); }
  Current(const Current&) = delete;

 private:
  int before_ = 0;
};

bool hopper(const Launch& launch) { return compute_capability(launch.device) / 10 == 9; }

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

#if !CUDA_ON_CPU
// report: any_kernel 4 registers
__global__ void any_kernel() {}
#endif

bool has_code([[maybe_unused]] int device) {
#if CUDA_ON_CPU
  return true;
#else
  const Current current(Launch{device, nullptr, Precision::exact, nullptr, nullptr});
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, any_kernel) == cudaSuccess;
  cudaGetLastError();  // a missing kernel must not be reported by whoever asks next
  return found;
#endif
}

}  // namespace

std::string unusable(int device) {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "driver version");
  check(cudaRuntimeGetVersion(&runtime), "runtime version");
  if (driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver supports CUDA " + version(driver) + ", the kernels were built with CUDA " +
           version(runtime) + ": update the driver, or build fastcompat with a toolkit of the driver's version";
  const int capability = compute_capability(device);
  if (capability < 80)
    return "its compute capability is " + std::to_string(capability / 10) + "." + std::to_string(capability % 10) +
           ", the kernels need 8.0 or more";
  if (!has_code(device))
    return "this build has no code for compute capability " + std::to_string(capability / 10) + "." +
           std::to_string(capability % 10) + ": build fastcompat without CMAKE_CUDA_ARCHITECTURES";
  return "";
}

size_t softmax_stats_scratch(const SoftmaxProblem& problem, bool want_mean, const Launch& launch) {
  if (hopper(launch) && sm90::covers_stats(problem)) return sm90::softmax_stats_scratch(problem, want_mean, launch);
  return sm80::softmax_stats_scratch(problem, want_mean, launch);
}

void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const Launch& launch) {
  const Current device(launch);
  if (hopper(launch) && sm90::covers_stats(problem)) return sm90::softmax_stats(problem, out, launch);
  sm80::softmax_stats(problem, out, launch);
}

size_t softmax_query_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const Launch& launch) {
  return sm80::softmax_query_grad_scratch(problem, grads, launch);
}

void softmax_query_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const Launch& launch) {
  const Current device(launch);
  sm80::softmax_query_grad(problem, grads, mean, dquery, dscale, launch);
}

size_t softmax_key_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, bool want_keys,
                                bool want_bias, const Launch& launch) {
  if (hopper(launch) && sm90::covers_key_grad(problem, want_keys))
    return sm90::softmax_key_grad_scratch(problem, grads, want_keys, want_bias, launch);
  return sm80::softmax_key_grad_scratch(problem, grads, want_keys, want_bias, launch);
}

void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch) {
  const Current device(launch);
  if (hopper(launch) && sm90::covers_key_grad(problem, dkeys))
    return sm90::softmax_key_grad(problem, grads, dkeys, dbias, launch);
  sm80::softmax_key_grad(problem, grads, dkeys, dbias, launch);
}

size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch) {
  if (hopper(launch) && sm90::covers_topk(segments)) return sm90::topk_scratch(segments, k, metric, filter, launch);
  return sm80::topk_scratch(segments, k, metric, filter, launch);
}

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch) {
  const Current device(launch);
  if (hopper(launch) && sm90::covers_topk(segments))
    return sm90::topk(segments, k, metric, filter, scores, ids, launch);
  sm80::topk(segments, k, metric, filter, scores, ids, launch);
}

size_t pair_scores_scratch(const Segment& segment, Metric metric, int64_t targets, const Launch& launch) {
  return sm80::pair_scores_scratch(segment, metric, targets, launch);
}

void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out,
                 const Launch& launch) {
  const Current device(launch);
  sm80::pair_scores(segment, metric, ids, targets, out, launch);
}

size_t count_beats_scratch(const Segment& segment, Metric metric, int64_t blocks, int64_t targets,
                           const Launch& launch) {
  return sm80::count_beats_scratch(segment, metric, blocks, targets, launch);
}

void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out,
                 const Launch& launch) {
  const Current device(launch);
  sm80::count_beats(segment, metric, bounds, blocks, thresholds, threshold_ids, targets, exclude, out, launch);
}

}  // namespace fastcompat::cuda
