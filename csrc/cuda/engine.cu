// The dispatcher: the table of tiers, and which of them runs a call, by the device's compute capability, by what a tier
// covers and by FASTCOMPAT_CUDA_TIER.
#include <cstdlib>
#include <map>
#include <mutex>

#include "device.h"
#include "engine.h"
#include "tiers.h"

namespace fastcompat::cuda {
namespace {

// An operator on a tier: what it takes and what runs it; null where the tier does not have it.
template <class Covers, class Scratch, class Run>
struct Operator {
  Covers* covers = nullptr;
  Scratch* scratch = nullptr;
  Run* run = nullptr;
};

struct Tier {
  const char* name;
  int capability;   // the least
  bool this_alone;  // only GPUs of that generation
  Operator<bool(const SoftmaxProblem&), decltype(cuda::softmax_stats_scratch), decltype(cuda::softmax_stats)> stats;
  Operator<bool(const SoftmaxProblem&), decltype(cuda::softmax_query_grad_scratch), decltype(cuda::softmax_query_grad)>
      query_grad;
  Operator<bool(const SoftmaxProblem&, bool), decltype(cuda::softmax_key_grad_scratch),
           decltype(cuda::softmax_key_grad)>
      key_grad;
  Operator<bool(const std::vector<Segment>&), decltype(cuda::topk_scratch), decltype(cuda::topk)> topk;
  Operator<bool(const Segment&), decltype(cuda::pair_scores_scratch), decltype(cuda::pair_scores)> pair_scores;
  Operator<bool(const Segment&), decltype(cuda::count_beats_scratch), decltype(cuda::count_beats)> count_beats;

  bool runs_on(int device_capability) const {
    return this_alone ? device_capability / 10 == capability / 10 : device_capability >= capability;
  }
};

template <class... Problem>
bool everything(Problem...) {
  return true;
}

// The first that runs on a device and covers a problem takes it; the last covers everything.
const Tier tiers[] = {
    {"sm90",
     90,
     true,
     {sm90::covers_stats, sm90::softmax_stats_scratch, sm90::softmax_stats},
     {},
     {sm90::covers_key_grad, sm90::softmax_key_grad_scratch, sm90::softmax_key_grad},
     {sm90::covers_topk, sm90::topk_scratch, sm90::topk},
     {},
     {}},
    {"sm80",
     80,
     false,
     {everything, sm80::softmax_stats_scratch, sm80::softmax_stats},
     {everything, sm80::softmax_query_grad_scratch, sm80::softmax_query_grad},
     {everything, sm80::softmax_key_grad_scratch, sm80::softmax_key_grad},
     {everything, sm80::topk_scratch, sm80::topk},
     {everything, sm80::pair_scores_scratch, sm80::pair_scores},
     {everything, sm80::count_beats_scratch, sm80::count_beats}},
};

const Tier* tier_by_environment() {
  const char* name = std::getenv("FASTCOMPAT_CUDA_TIER");
  if (!name || !*name) return nullptr;
  for (const Tier& tier : tiers)
    if (std::string(name) == tier.name) return &tier;
  throw std::invalid_argument("FASTCOMPAT_CUDA_TIER: unknown tier '" + std::string(name) +
                              "': expected sm80 or sm90, or nothing for the best that the device runs");
}

// Read once: a call's scratch and its run must agree.
const Tier* chosen_tier() {
  static const Tier* const tier = tier_by_environment();
  return tier;
}

int compute_capability(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  return 10 * major + minor;
}

// Who runs an operator on this problem. A tier that is chosen leaves what it does not cover to those after it.
template <class Op, class... Problem>
const Op& choose(Op Tier::* op, const Launch& launch, const Problem&... problem) {
  const Tier* chosen = chosen_tier();
  const int capability = compute_capability(launch.device);
  for (const Tier& tier : tiers) {
    if (&tier < chosen || !tier.runs_on(capability)) continue;
    const Op& found = tier.*op;
    if (found.run && found.covers(problem...)) return found;
  }
  throw std::runtime_error("no kernel for compute capability " + std::to_string(capability));
}

// Makes the primary context of a launch's device the current one for as long as it lives. Pushed, not set: a thread
// that had no context has none afterwards, and no other device gets one, which cudaSetDevice(0) would give it.
class Current {
 public:
  explicit Current(int device) {
    static const auto device_of = DRIVER_FUNCTION(cuDeviceGet, 2000);
    static const auto retain = DRIVER_FUNCTION(cuDevicePrimaryCtxRetain, 7000);
    static const auto push = DRIVER_FUNCTION(cuCtxPushCurrent, 4000);
    static const auto pop = DRIVER_FUNCTION(cuCtxPopCurrent, 4000);
    static std::mutex mutex;
    static std::map<int, CUcontext> retained;  // and never released: the caller's tensors keep contexts alive anyway
    CUcontext context = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      CUcontext& known = retained[device];
      if (!known) {
        CUdevice handle = 0;
        driver(device_of(&handle, device), "cuDeviceGet");
        driver(retain(&known, handle), "cuDevicePrimaryCtxRetain");
      }
      context = known;
    }
    driver(push(context), "cuCtxPushCurrent");
    pop_ = pop;
  }
  ~Current() {
    CUcontext popped;
    pop_(&popped);
  }
  Current(const Current&) = delete;

 private:
  CUresult (*pop_)(CUcontext*);

  static void driver(CUresult status, const char* what) {
    if (status != CUDA_SUCCESS)
      throw std::runtime_error(std::string(what) + ": CUDA driver error " + std::to_string(static_cast<int>(status)));
  }
};

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

#if !CUDA_ON_CPU
// report: any_kernel 4 registers
__global__ void any_kernel() {}
#endif

bool has_code([[maybe_unused]] int device) {
#if CUDA_ON_CPU
  return true;
#else
  const Current current(device);
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, any_kernel) == cudaSuccess;
  cudaGetLastError();  // a missing kernel must not be reported by whoever asks next
  return found;
#endif
}

std::string why_unusable(int device) {
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
  if (const Tier* tier = chosen_tier(); tier && !tier->runs_on(capability))
    return std::string("FASTCOMPAT_CUDA_TIER=") + tier->name + " needs compute capability " +
           std::to_string(tier->capability / 10) + (tier->this_alone ? ".x" : ".0 or more") + ", the device has " +
           std::to_string(capability / 10) + "." + std::to_string(capability % 10) + ": unset it, or choose sm80";
  if (!has_code(device))
    return "this build has no code for compute capability " + std::to_string(capability / 10) + "." +
           std::to_string(capability % 10) + ": build fastcompat without CMAKE_CUDA_ARCHITECTURES";
  return "";
}

// Answers by device. A question that fails is asked again.
std::mutex answers_mutex;
std::map<int, std::string> answers;

}  // namespace

std::string unusable(int device) {
  const std::lock_guard<std::mutex> lock(answers_mutex);
  const auto known = answers.find(device);
  if (known != answers.end()) return known->second;
  return answers[device] = why_unusable(device);
}

#if CUDA_ON_CPU
void forget_devices() {
  const std::lock_guard<std::mutex> lock(answers_mutex);
  answers.clear();
}
#endif

std::string tier() { return chosen_tier() ? chosen_tier()->name : ""; }

size_t softmax_stats_scratch(const SoftmaxProblem& problem, bool want_mean, const Launch& launch) {
  return choose(&Tier::stats, launch, problem).scratch(problem, want_mean, launch);
}

void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const Launch& launch) {
  const Current current(launch.device);
  choose(&Tier::stats, launch, problem).run(problem, out, launch);
}

size_t softmax_query_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const Launch& launch) {
  return choose(&Tier::query_grad, launch, problem).scratch(problem, grads, launch);
}

void softmax_query_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const Launch& launch) {
  const Current current(launch.device);
  choose(&Tier::query_grad, launch, problem).run(problem, grads, mean, dquery, dscale, launch);
}

size_t softmax_key_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, bool want_keys,
                                bool want_bias, const Launch& launch) {
  return choose(&Tier::key_grad, launch, problem, want_keys).scratch(problem, grads, want_keys, want_bias, launch);
}

void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch) {
  const Current current(launch.device);
  choose(&Tier::key_grad, launch, problem, dkeys != nullptr).run(problem, grads, dkeys, dbias, launch);
}

size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch) {
  return choose(&Tier::topk, launch, segments).scratch(segments, k, metric, filter, launch);
}

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch) {
  const Current current(launch.device);
  choose(&Tier::topk, launch, segments).run(segments, k, metric, filter, scores, ids, launch);
}

size_t pair_scores_scratch(const Segment& segment, Metric metric, int64_t targets, const Launch& launch) {
  return choose(&Tier::pair_scores, launch, segment).scratch(segment, metric, targets, launch);
}

void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out,
                 const Launch& launch) {
  const Current current(launch.device);
  choose(&Tier::pair_scores, launch, segment).run(segment, metric, ids, targets, out, launch);
}

size_t count_beats_scratch(const Segment& segment, Metric metric, int64_t blocks, int64_t targets,
                           const Launch& launch) {
  return choose(&Tier::count_beats, launch, segment).scratch(segment, metric, blocks, targets, launch);
}

void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out,
                 const Launch& launch) {
  const Current current(launch.device);
  choose(&Tier::count_beats, launch, segment)
      .run(segment, metric, bounds, blocks, thresholds, threshold_ids, targets, exclude, out, launch);
}

}  // namespace fastcompat::cuda
