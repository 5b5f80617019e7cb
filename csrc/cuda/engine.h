// The CUDA engine's whole interface: the problems of fastcompat.h with device pointers, enqueued on a stream. Nothing
// here synchronises or allocates; every call may be captured in a CUDA graph.
#pragma once
#include <cstddef>

#include "../fastcompat.h"

namespace fastcompat::cuda {

// How float32 products are formed (torch.get_float32_matmul_precision()); 16-bit inputs ignore it.
// exact "highest": 3 bf16 terms, 6 products, fp32-accurate; high "high": 2 terms, 3 products; fast "medium": 1 term.
enum class Precision : int { exact = 0, high = 1, fast = 2 };

struct Launch {
  int device;
  void* stream;  // cudaStream_t of the caller
  Precision precision;
  const float* scale_factor;  // device scalar that multiplies problem.scale, or null
  void* scratch;              // 256-byte aligned, at least as large as the matching *_scratch says
};

// Why this device cannot run the kernels and what to do about it; empty where it can. Found out once per device.
std::string unusable(int device);

// The tier of kernels that the environment variable FASTCOMPAT_CUDA_TIER names, sm80 or sm90; empty where the device
// decides. Throws std::invalid_argument for another name.
std::string tier();

// *_scratch: bytes of scratch the call wants, from shapes, dtypes and the device alone (pointers are not read, but
// whether one is null may count; launch.scratch is ignored).
size_t softmax_stats_scratch(const SoftmaxProblem& problem, bool want_mean, const Launch& launch);
void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const Launch& launch);

size_t softmax_query_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const Launch& launch);
void softmax_query_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const Launch& launch);

size_t softmax_key_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, bool want_keys,
                                bool want_bias, const Launch& launch);
void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch);

// The first 8 bytes of a search call's scratch are a flag word, written by the call and read by the caller once the
// stream has run: all_finite, or the smallest nonfinite_code of a row that holds NaN or infinity.
constexpr unsigned long long all_finite = ~0ull;
constexpr unsigned long long nonfinite_code(unsigned long long segment, bool keys, unsigned long long row) {
  return segment << 49 | static_cast<unsigned long long>(keys) << 48 | row;
}

size_t topk_scratch(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter,
                    const Launch& launch);
void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, const Launch& launch);

size_t pair_scores_scratch(const Segment& segment, Metric metric, int64_t targets, const Launch& launch);
void pair_scores(const Segment& segment, Metric metric, const int64_t* ids, int64_t targets, float* out,
                 const Launch& launch);

// bounds [blocks + 1] is a device pointer like the others.
size_t count_beats_scratch(const Segment& segment, Metric metric, int64_t blocks, int64_t targets,
                           const Launch& launch);
void count_beats(const Segment& segment, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out,
                 const Launch& launch);

}  // namespace fastcompat::cuda
