// The Hopper tier of the softmax engine: 16-bit inputs of up to 512 columns. The functions are those of engine.h;
// covers_* says which problems they take: dimension and row strides multiples of 8, data 16-byte aligned, no side
// empty.
#pragma once
#include "engine.h"

namespace fastcompat::cuda::sm90 {

bool covers_stats(const SoftmaxProblem& problem);
size_t softmax_stats_scratch(const SoftmaxProblem& problem, bool want_mean, const Launch& launch);
void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const Launch& launch);

bool covers_key_grad(const SoftmaxProblem& problem, bool want_keys);
size_t softmax_key_grad_scratch(const SoftmaxProblem& problem, const SoftmaxGrads& grads, bool want_keys,
                                bool want_bias, const Launch& launch);
void softmax_key_grad(const SoftmaxProblem& problem, const SoftmaxGrads& grads, void* dkeys, float* dbias,
                      const Launch& launch);

}  // namespace fastcompat::cuda::sm90
