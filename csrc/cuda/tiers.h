// The tiers of kernels: who runs the operators of engine.h. engine.cu holds the table of them and chooses.
#pragma once
#include "engine.h"

namespace fastcompat::cuda {

// The portable tier: every operator, every problem, on compute capability 8.0 and newer.
namespace sm80 {

// What a search's scratch holds at most, besides a few words per row. Tests make it small.
struct Limits {
  int64_t packed_bytes;     // of keys
  int64_t candidate_bytes;  // more queries are searched in batches
};
inline Limits limits = {64ll << 20, 1ll << 30};

decltype(cuda::softmax_stats_scratch) softmax_stats_scratch;
decltype(cuda::softmax_stats) softmax_stats;
decltype(cuda::softmax_query_grad_scratch) softmax_query_grad_scratch;
decltype(cuda::softmax_query_grad) softmax_query_grad;
decltype(cuda::softmax_key_grad_scratch) softmax_key_grad_scratch;
decltype(cuda::softmax_key_grad) softmax_key_grad;
decltype(cuda::topk_scratch) topk_scratch;
decltype(cuda::topk) topk;
decltype(cuda::pair_scores_scratch) pair_scores_scratch;
decltype(cuda::pair_scores) pair_scores;
decltype(cuda::count_beats_scratch) count_beats_scratch;
decltype(cuda::count_beats) count_beats;

}  // namespace sm80

// The Hopper tier: compute capability 9.x, and of problems what covers_* says. Softmax: 16-bit inputs of up to 512
// columns, dimension and row strides multiples of 8, data 16-byte aligned, no side empty. Top-k: every dtype, metric
// and k, segments of up to 512 columns and 2^27 keys.
namespace sm90 {

bool covers_stats(const SoftmaxProblem& problem);
bool covers_key_grad(const SoftmaxProblem& problem, bool want_keys);
bool covers_topk(const std::vector<Segment>& segments);

decltype(cuda::softmax_stats_scratch) softmax_stats_scratch;
decltype(cuda::softmax_stats) softmax_stats;
decltype(cuda::softmax_key_grad_scratch) softmax_key_grad_scratch;
decltype(cuda::softmax_key_grad) softmax_key_grad;
decltype(cuda::topk_scratch) topk_scratch;
decltype(cuda::topk) topk;

}  // namespace sm90
}  // namespace fastcompat::cuda
