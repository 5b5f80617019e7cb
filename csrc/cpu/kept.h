// How the keys of a forward pass are cut, and where each part keeps its exponentials.
#pragma once
#include "kernels.h"
#include "plan.h"

namespace fastcompat {

constexpr int64_t kSmallestPart = 512;

inline Plan forward_plan(const SoftmaxProblem& p, bool want_mean, bool keeping) {
  const int64_t B = p.query.rows, N = p.keys.rows, D = p.query.dim;
  const int64_t part_bytes = want_mean ? B * D * 4 : B * 8;
  // Exponentials take the memory: partial results get a quarter of their share.
  return {B, N, block_of(B, 8 * D), keeping ? 4 * part_bytes : part_bytes, kSmallestPart};
}

inline int64_t blocks_of_part(const Plan& plan) { return (plan.rows + kernels().pack_rows - 1) / kernels().pack_rows; }

inline Kept part_of(const Kept& all, const Plan& plan, int64_t part) {
  const int64_t blocks = part * blocks_of_part(plan);
  return {all.exps + blocks * kernels().pack_rows * all.queries, all.shifts + blocks * all.queries, all.queries,
          all.streamed};
}

void check_indices(const SoftmaxProblem& problem);

// The positive of row i where positives are given by index, or -1: none, excluded, or never counted (bias -inf).
int64_t chosen_positive(const SoftmaxProblem& problem, int64_t i);

// As the public function; what is to be kept has room for every part of the plan.
void softmax_stats(const SoftmaxProblem& problem, const SoftmaxStats& out, const Kept& kept, int threads);

}  // namespace fastcompat
