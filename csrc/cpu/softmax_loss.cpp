// The mean or the sum of log(1 + exp(neg_lse_i - pos_lse_i)), and its gradients in the same call.
//
// A row's gradient is known with the row, up to the one number that arrives later. So where the keys want a gradient,
// queries go in passes small enough to keep their exponentials, and each pass adds its share to the key gradient:
// three products of 2*B*N*D instead of four, for one more read and write of the key gradient in every pass.
#include <cmath>
#include <limits>
#include <vector>

#include "kept.h"
#include "pool.h"

namespace fastcompat {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kKeptBytes = 32ll << 20;
constexpr int64_t kStreamedBytes = 8ll << 20;  // more than this is read from memory anyway
constexpr int64_t kFewest = 128;  // queries whose exponentials must fit, for a pass to be worth its traffic

SoftmaxProblem rows_of(const SoftmaxProblem& p, int64_t first, int64_t count) {
  SoftmaxProblem part = p;
  part.query.rows = count;
  part.query.data =
      static_cast<const char*>(p.query.data) + first * p.query.stride * (p.query.dtype == DType::f32 ? 4 : 2);
  for (const int64_t** rows : {&part.query_labels, &part.positive, &part.exclude})
    if (*rows) *rows += first;
  return part;
}

// Queries of a pass that keeps its exponentials, 0 where nothing is kept.
int64_t rows_of_pass(const SoftmaxProblem& p) {
  const int64_t B = p.query.rows, N = p.keys.rows;
  if (!p.positive || p.keys.dtype != DType::f32 || B == 0 || N == 0) return 0;
  const int64_t most = std::min<int64_t>(512, kKeptBytes / (4 * N)) / 64 * 64;
  if (most < kFewest) return 0;
  const int64_t passes = (B + most - 1) / most;
  return ((B + passes - 1) / passes + 63) / 64 * 64;
}

// What one pass finds out about its rows.
struct Rows {
  std::vector<float> neg_lse, pos_lse, pos_sum, g_neg, g_pos;
  std::vector<int64_t> pos_count;

  explicit Rows(int64_t count)
      : neg_lse(count), pos_lse(count), pos_sum(count), g_neg(count), g_pos(count), pos_count(count) {}

  SoftmaxStats stats(float* mean) { return {neg_lse.data(), pos_lse.data(), pos_sum.data(), pos_count.data(), mean}; }
  SoftmaxGrads grads() const { return {neg_lse.data(), pos_lse.data(), g_neg.data(), g_pos.data(), nullptr}; }

  // The losses of the first `count` rows and their gradients; rows without positives take no part.
  double log_odds(int64_t count, double weight) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double odds = pos_count[i] ? static_cast<double>(neg_lse[i]) - pos_lse[i] : -kInf;
      total += weight * (odds > 40 ? odds : std::log1p(std::exp(odds)));
      g_neg[i] = static_cast<float>(weight / (1 + std::exp(-odds)));
      g_pos[i] = -g_neg[i];
    }
    return total;
  }
};

int64_t rows_with_positives(const SoftmaxProblem& p, const Rows& rows) {
  int64_t count = 0;
  for (int64_t i = 0; i < p.query.rows; ++i) count += p.positive ? chosen_positive(p, i) >= 0 : rows.pos_count[i] > 0;
  return count;
}

void add_key_gradient(const SoftmaxProblem& p, const Kept& kept, const Plan& plan, Rows& rows, float* dkeys, bool add,
                      int threads) {
  const int64_t B = p.query.rows, N = p.keys.rows;
  for (float& lse : rows.neg_lse) lse = lse == -kInf ? kInf : lse;
  parallel_for(plan.splits, threads_for(threads, N, B, p.query.dim), [&](int64_t part, Workspace& ws) {
    const int64_t begin = std::min(part * plan.rows, N), end = std::min(begin + plan.rows, N);
    KeptItem item{};
    item.query = {p.query, nullptr, 0, B};
    item.keys = {p.keys, nullptr, begin, end - begin};
    item.kept = part_of(kept, plan, part);
    item.scale = p.scale;
    item.neg_lse = rows.neg_lse.data();
    item.g_neg = rows.g_neg.data();
    item.g_pos = rows.g_pos.data();
    item.positive = p.positive;
    item.exclude = p.exclude;
    item.dkeys = dkeys;
    item.add = add;
    kernels().kept_gradient(item, ws);
  });
}

}  // namespace

void softmax_loss(const SoftmaxProblem& p, bool mean, float* loss, void* dquery, void* dkeys, int threads) {
  check_indices(p);
  const int64_t B = p.query.rows, D = p.query.dim;
  const int64_t keeping = dkeys ? rows_of_pass(p) : 0, pass = keeping ? keeping : std::max<int64_t>(B, 1);
  Rows rows(std::min(pass, B));
  const bool f32 = p.query.dtype == DType::f32;
  std::vector<float> means(dquery && !f32 ? B * D : 0);
  Workspace memory;
  Kept kept{};
  if (keeping) prefer_large_pages(dkeys, p.keys.rows * D * 4);
  double total = 0, weight = 1;
  for (int64_t first = 0; first == 0 || first < B; first += pass) {
    const SoftmaxProblem part = rows_of(p, first, std::min(pass, B - first));
    const Plan plan = forward_plan(part, dquery != nullptr, keeping != 0);
    if (keeping && first == 0) {
      const int64_t blocks = plan.splits * blocks_of_part(plan), count = blocks * kernels().pack_rows * pass;
      kept = {memory.floats(0, count), memory.floats(1, blocks * pass), pass, 4 * count > kStreamedBytes};
    }
    void* out = dquery ? static_cast<char*>(dquery) + first * D * (f32 ? 4 : 2) : nullptr;
    float* mean_key = f32 ? static_cast<float*>(out) : means.data();
    softmax_stats(part, rows.stats(mean_key), kept, threads);
    if (mean && first == 0) weight = 1.0 / std::max<int64_t>(1, rows_with_positives(p, rows));
    total += rows.log_odds(part.query.rows, weight);
    if (dquery) softmax_query_grad(part, rows.grads(), mean_key, out, nullptr, threads);
    if (keeping)
      add_key_gradient(part, kept, plan, rows, static_cast<float*>(dkeys), first > 0, threads);
    else if (dkeys)
      softmax_key_grad(part, rows.grads(), dkeys, nullptr, threads);
  }
  *loss = static_cast<float>(total);
}

}  // namespace fastcompat
