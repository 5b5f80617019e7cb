// Softmax statistics and gradients for every GPU from sm_80 on; meanings in engine.h.
#pragma once
#include "engine.h"

namespace fastcompat::cuda::sm80 {

size_t softmax_stats_scratch(const SoftmaxProblem& problem, bool want_mean, const Launch& launch);
void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const Launch& launch);
size_t softmax_query_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const Launch& launch);
void softmax_query_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, const Launch& launch);
size_t softmax_key_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, bool want_keys,
                                bool want_bias, const Launch& launch);
void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch);

}  // namespace fastcompat::cuda::sm80
