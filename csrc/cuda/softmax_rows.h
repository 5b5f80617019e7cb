// What happens to rows before and after the softmax kernels of any tier: rounding to 16-bit planes, the gradients that
// arrive, the ordered combining of splits, a positive that is given by its index. Each function launches one kernel.
#pragma once
#include "engine.h"

namespace fastcompat::cuda {

constexpr int64_t kNoQueryLabel = -2, kNoKeyLabel = -1;  // differ: what has no label matches nothing

// Of one part of the keys, a split's or a consumer's: maximum and sum of exponentials under it.
struct RowPart {
  float top, sum_exp;  // negatives
  float pos_top, pos_sum_exp, pos_sum;
  int pos_count;
};

// neg_lse, pos_lse, pos_sum, pos_count and, where out.mean is given, mean = sum_s of e^(top_s - top) sums_s / total.
struct CombineArgs {
  const SoftmaxProblem& problem;
  const float* scale_factor;
  const RowPart* parts;                    // [splits * parts_a_split, B]
  const float *first_sums, *further_sums;  // [B, D] of split 0, [splits - 1, B, D]
  int splits, parts_a_split;               // the parts of a split have the same top
  float unit;                              // of top and pos_sum: 1, or ln 2 where they are logarithms to the base 2
  const SoftmaxStats& out;
};
void combine_stats(const CombineArgs& args, void* stream);

// What a query's pairs need for their coefficients, made harmless where its set is empty: lse +inf, gradient 0.
struct alignas(16) QueryInfo {
  float neg_lse, g_neg, pos_lse, g_pos, g_sum, unused;
  int64_t label, positive, exclude;
};
// Gradients times *coefficient_scale; null: 1. out [B].
void make_query_info(const SoftmaxProblem& problem, const SoftmaxGrads& grads, const float* coefficient_scale,
                     QueryInfo* out, void* stream);

// The power of two that takes the largest possible coefficient to 2^14 .. 2^15: fp16 coefficients keep their bits.
void find_coefficient_scale(const SoftmaxProblem& problem, const SoftmaxGrads& grads, float* out, void* stream);

// u = g_neg mean + sum over positives; dquery = scale u, dscale = <query, u>.
struct QueryGradArgs {
  const SoftmaxProblem& problem;
  const float* scale_factor;
  const SoftmaxGrads& grads;
  const float* mean;
  const float* sums;  // [splits, B, D] positives' share, or null
  const float* dots;  // [splits, B] of its products with the query, from coefficients that are not rounded
  int splits;
  void* dquery;
  float* dscale;
};
void finish_query_grad(const QueryGradArgs& args, void* stream);

// out[i] = scale * sum over splits of parts[split, i], in their order; i < count.
void sum_splits(const float* parts, int64_t count, int64_t splits, float scale, const float* scale_factor, void* out,
                DType dtype, void* stream);

// Rows of any stride become planes of 16-byte aligned rows: a float is split into `terms` bf16 numbers.
void pack_rows(const Matrix& from, int terms, uint16_t* to, int64_t stride, int64_t plane, void* stream);

}  // namespace fastcompat::cuda
