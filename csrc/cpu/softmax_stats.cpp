// Softmax statistics and their gradients: cuts the work into items, combines partial results in order.
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "groups.h"
#include "kept.h"
#include "plan.h"
#include "pool.h"

namespace fastcompat {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// In double, with partial sums that vectors can hold.
double dot(const float* a, const float* b, int64_t n) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= n; d += 8)
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(a[d + j]) * b[d + j];
  for (; d < n; ++d) sums[0] += static_cast<double>(a[d]) * b[d];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// fn(first, end) for the rows of a batch, a few at a time.
template <class Fn>
void for_rows(int64_t count, int threads, Fn&& fn) {
  constexpr int64_t kRows = 64;
  if (threads <= 1) return fn(int64_t{0}, count);
  parallel_for((count + kRows - 1) / kRows, threads,
               [&](int64_t n, Workspace&) { fn(n * kRows, std::min(count, (n + 1) * kRows)); });
}

std::unique_ptr<Groups> groups_of(const SoftmaxProblem& p) {
  if (!p.query_labels) return nullptr;
  return std::make_unique<Groups>(p.query_labels, p.query.rows, p.key_labels, p.keys.rows);
}

// Partial results of all splits, of one kind of statistic.
struct Partials {
  std::vector<float> max, sum_exp, mean;  // [splits, B], and [splits - 1, B, D]: the first lies in the output

  Partials(int64_t splits, int64_t rows, int64_t dim, bool want_mean)
      : max(splits * rows), sum_exp(splits * rows), mean(want_mean ? (splits - 1) * rows * dim : 0) {}
};

float shift_of(float max) { return std::isfinite(max) ? max : 0.0f; }

// What takes a partial sum under the shift of its own maximum to another shift; 0 for a part without a logit, whose
// shift says nothing.
double factor_of(float max, double shift) { return max == -kInf ? 0 : std::exp(shift_of(max) - shift); }

void negatives(const SoftmaxProblem& p, const Groups* groups, const SoftmaxStats& out, const Kept& kept, int threads) {
  const Kernels& k = kernels();
  const int64_t B = p.query.rows, N = p.keys.rows, D = p.query.dim;
  const Plan plan = forward_plan(p, out.mean != nullptr, kept.exps != nullptr);
  Partials part(plan.splits, B, D, out.mean != nullptr);
  threads = threads_for(threads, B, N, D);
  parallel_for(plan.items(), threads, [&](int64_t item, Workspace& ws) {
    const int64_t split = item % plan.splits, first = item / plan.splits * plan.block;
    const int64_t begin = std::min(split * plan.rows, N), end = std::min(begin + plan.rows, N);
    ForwardItem f{};
    f.query = {p.query, nullptr, first, std::min(plan.block, B - first)};
    f.keys = {p.keys, nullptr, begin, end - begin};
    f.scale = p.scale;
    f.bias = p.bias;
    if (groups) {
      f.query_group = groups->query_group.data();
      f.key_group = groups->key_group.data();
    }
    f.left_out[0] = p.positive;
    f.left_out[1] = p.exclude;
    f.max = part.max.data() + split * B;
    f.sum_exp = part.sum_exp.data() + split * B;
    if (out.mean) f.mean = split ? part.mean.data() + (split - 1) * B * D : out.mean;
    if (kept.exps) f.kept = part_of(kept, plan, split);
    k.forward(f, ws);
  });
  for_rows(B, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float top = -kInf;
      for (int64_t s = 0; s < plan.splits; ++s) top = std::max(top, part.max[s * B + i]);
      const double shift = shift_of(top);
      double total = 0;
      for (int64_t s = 0; s < plan.splits; ++s)
        total += part.sum_exp[s * B + i] * factor_of(part.max[s * B + i], shift);
      out.neg_lse[i] = static_cast<float>(shift + std::log(total));
      if (!out.mean) continue;
      float* mean = out.mean + i * D;
      for (int64_t s = 0; s < plan.splits; ++s) {
        const double weight = total == 0 ? 0 : factor_of(part.max[s * B + i], shift) / total;
        const float factor = static_cast<float>(weight);
        const float* in = s ? part.mean.data() + ((s - 1) * B + i) * D : mean;
        for (int64_t d = 0; d < D; ++d) mean[d] = factor * in[d] + (s ? mean[d] : 0.0f);
      }
    }
  });
}

// One item for every group and block of its queries.
struct GroupBlock {
  int64_t group, first, count;
};

std::vector<GroupBlock> group_blocks(const Groups& groups, int64_t block) {
  std::vector<GroupBlock> blocks;
  for (int64_t g = 0; g < groups.count; ++g) {
    if (groups.key_start[g] == groups.key_start[g + 1]) continue;
    for (int64_t i = groups.query_start[g]; i < groups.query_start[g + 1]; i += block)
      blocks.push_back({g, i, std::min(block, groups.query_start[g + 1] - i)});
  }
  return blocks;
}

RowRange keys_of(const Groups& groups, int64_t g, const Matrix& keys) {
  return {keys, groups.key_rows.data(), groups.key_start[g], groups.key_start[g + 1] - groups.key_start[g]};
}

void positives_by_label(const SoftmaxProblem& p, const Groups& groups, const SoftmaxStats& out, int threads) {
  const Kernels& k = kernels();
  const int64_t B = p.query.rows;
  std::vector<float> max(B, -kInf), sum_exp(B, 0.0f);
  std::fill(out.pos_sum, out.pos_sum + B, 0.0f);
  const std::vector<GroupBlock> blocks = group_blocks(groups, block_of(B, 8 * p.query.dim));
  parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t item, Workspace& ws) {
    const GroupBlock& b = blocks[item];
    ForwardItem f{};
    f.query = {p.query, groups.query_rows.data(), b.first, b.count};
    f.keys = keys_of(groups, b.group, p.keys);
    f.scale = p.scale;
    f.bias = p.bias;
    f.left_out[0] = p.exclude;
    f.max = max.data();
    f.sum_exp = sum_exp.data();
    f.sum = out.pos_sum;
    k.forward(f, ws);
  });
  const auto counts = [&](int64_t key) { return !p.bias || p.bias[key] != -kInf; };
  std::vector<int64_t> keys(groups.count);
  for (int64_t g = 0; g < groups.count; ++g)
    for (int64_t n = groups.key_start[g]; n < groups.key_start[g + 1]; ++n) keys[g] += counts(groups.key_rows[n]);
  for (int64_t i = 0; i < B; ++i) {
    const int32_t g = groups.query_group[i];
    int64_t count = g < 0 ? 0 : keys[g];
    if (p.exclude && p.exclude[i] >= 0 && groups.key_group[p.exclude[i]] == g) count -= counts(p.exclude[i]);
    out.pos_count[i] = count;
    out.pos_lse[i] = static_cast<float>(shift_of(max[i]) + std::log(static_cast<double>(sum_exp[i])));
  }
}

void positives_by_index(const SoftmaxProblem& p, const SoftmaxStats& out, int threads) {
  const Kernels& k = kernels();
  const int64_t D = p.query.dim;
  for_rows(p.query.rows, threads, [&](int64_t first, int64_t last) {
    std::vector<float> q(D), key(D);
    for (int64_t i = first; i < last; ++i) {
      const int64_t j = chosen_positive(p, i);
      double logit = 0;
      if (j >= 0) {
        k.load_row(q.data(), p.query, i);
        k.load_row(key.data(), p.keys, j);
        logit = p.scale * dot(q.data(), key.data(), D) + (p.bias ? p.bias[j] : 0.0f);
      }
      out.pos_count[i] = j >= 0;
      out.pos_lse[i] = j >= 0 ? static_cast<float>(logit) : -kInf;
      out.pos_sum[i] = j >= 0 ? static_cast<float>(logit) : 0.0f;
    }
  });
}

// The incoming gradients, with rows whose set is empty made harmless: lse +inf and gradient 0.
struct CleanGrads {
  std::vector<float> neg_lse, g_neg, pos_lse, g_pos, g_sum;

  CleanGrads(const SoftmaxGrads& in, int64_t B) {
    set(neg_lse, g_neg, in.neg_lse, in.g_neg, B);
    set(pos_lse, g_pos, in.pos_lse, in.g_pos, B);
    set(pos_lse, g_sum, in.pos_lse, in.g_sum, B);
  }

 private:
  static void set(std::vector<float>& lse, std::vector<float>& grad, const float* in_lse, const float* in_grad,
                  int64_t B) {
    lse.resize(B);
    grad.resize(B);
    for (int64_t i = 0; i < B; ++i) {
      const bool empty = in_lse[i] == -kInf;
      lse[i] = empty ? kInf : in_lse[i];
      grad[i] = empty || !in_grad ? 0.0f : in_grad[i];
    }
  }
};

GradientItem gradient_item(const SoftmaxProblem& p, const CleanGrads& g) {
  GradientItem item{};
  item.scale = p.scale;
  item.bias = p.bias;
  item.neg_lse = g.neg_lse.data();
  item.g_neg = g.g_neg.data();
  item.pos_lse = g.pos_lse.data();
  item.g_pos = g.g_pos.data();
  item.g_sum = g.g_sum.data();
  item.exclude = p.exclude;
  return item;
}

}  // namespace

int64_t chosen_positive(const SoftmaxProblem& p, int64_t i) {
  const int64_t j = p.positive[i];
  const bool never = j < 0 || (p.exclude && p.exclude[i] == j) || (p.bias && p.bias[j] == -kInf);
  return never ? -1 : j;
}

void check_indices(const SoftmaxProblem& p) {
  for (const auto& [name, index] : {std::pair{"positive", p.positive}, std::pair{"exclude", p.exclude}})
    for (int64_t i = 0; index && i < p.query.rows; ++i)
      if (index[i] < -1 || index[i] >= p.keys.rows)
        throw std::invalid_argument(std::string("`") + name + "` must hold key numbers from 0 to " +
                                    std::to_string(p.keys.rows - 1) + ", or -1: row " + std::to_string(i) + " holds " +
                                    std::to_string(index[i]));
}

void softmax_stats(const SoftmaxProblem& p, const SoftmaxStats& out, int threads) {
  softmax_stats(p, out, Kept{}, threads);
}

void softmax_stats(const SoftmaxProblem& p, const SoftmaxStats& out, const Kept& kept, int threads) {
  check_indices(p);
  const std::unique_ptr<Groups> groups = groups_of(p);
  negatives(p, groups.get(), out, kept, threads);
  if (p.positive) {
    positives_by_index(p, out, threads_for(threads, p.query.rows, p.keys.rows, p.query.dim));
  } else if (groups) {
    positives_by_label(p, *groups, out, threads);
  } else {
    std::fill(out.pos_lse, out.pos_lse + p.query.rows, -kInf);
    std::fill(out.pos_sum, out.pos_sum + p.query.rows, 0.0f);
    std::fill(out.pos_count, out.pos_count + p.query.rows, 0);
  }
}

void softmax_query_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, const float* mean, void* dquery,
                        float* dscale, int threads) {
  check_indices(p);
  const Kernels& k = kernels();
  const int64_t B = p.query.rows, D = p.query.dim;
  const CleanGrads g(grads, B);
  const bool in_place = dquery && p.query.dtype == DType::f32;
  std::vector<float> sums(in_place ? 0 : B * D);
  float* u = in_place ? static_cast<float*>(dquery) : sums.data();  // [B, D]
  const int row_threads = threads_for(threads, B, p.keys.rows, D);
  for_rows(B, row_threads, [&](int64_t first, int64_t last) {
    std::vector<float> row(D);
    const auto along_query = [&](int64_t i) {
      k.load_row(row.data(), p.query, i);
      return static_cast<float>(dot(row.data(), u + i * D, D));
    };
    for (int64_t i = first; i < last; ++i) {
      const bool negatives = g.neg_lse[i] != kInf && grads.g_neg;
      const int64_t dim = D;  // locals: the loops must not read through the lambda's references
      float* ui = u + i * D;
      const float *mean_i = mean + i * D, g_neg = g.g_neg[i];
      for (int64_t d = 0; d < dim; ++d) ui[d] = negatives ? g_neg * mean_i[d] : 0.0f;
      const int64_t j = p.positive ? chosen_positive(p, i) : -1;
      if (j >= 0 && g.pos_lse[i] != kInf) {
        k.load_row(row.data(), p.keys, j);
        const float weight = g.g_pos[i] + g.g_sum[i];
        const float* key = row.data();
        for (int64_t d = 0; d < dim; ++d) ui[d] += weight * key[d];
      }
      if (dscale) dscale[i] = along_query(i);
    }
  });
  if (!p.positive && p.query_labels && (grads.g_pos || grads.g_sum)) {
    const std::unique_ptr<Groups> groups = groups_of(p);
    const std::vector<GroupBlock> blocks = group_blocks(*groups, block_of(B, 8 * D));
    parallel_for(static_cast<int64_t>(blocks.size()), threads, [&](int64_t n, Workspace& ws) {
      GradientItem item = gradient_item(p, g);
      item.lanes = {p.query, groups->query_rows.data(), blocks[n].first, blocks[n].count};
      item.rows = keys_of(*groups, blocks[n].group, p.keys);
      item.lanes_are_queries = true;
      item.out = u;
      item.out_dot = dscale;  // not <query, u>: the weights of u may be rounded to 16 bits
      k.gradient(item, ws);
    });
  }
  if (!dquery) return;
  for_rows(B, row_threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) k.store_row(dquery, p.query.dtype, i, u + i * D, D, p.scale);
  });
}

void softmax_key_grad(const SoftmaxProblem& p, const SoftmaxGrads& grads, void* dkeys, float* dbias, int threads) {
  check_indices(p);
  const Kernels& k = kernels();
  const int64_t B = p.query.rows, N = p.keys.rows, D = p.query.dim;
  const CleanGrads g(grads, B);
  const std::unique_ptr<Groups> groups = groups_of(p);
  // A split costs another [N, D] of sums, so here few items must do.
  const Plan plan(N, B, block_of(N, 8 * D), N * (dkeys ? D + 1 : 1) * 4, kSmallestPart / 2, kItems / 4);
  const bool split = plan.splits > 1;
  std::vector<float> sums(split && dkeys ? plan.splits * N * D : 0), bias(split && dbias ? plan.splits * N : 0);
  if (dkeys) prefer_large_pages(dkeys, N * D * (p.keys.dtype == DType::f32 ? 4 : 2));
  if (dbias) std::fill(dbias, dbias + N, 0.0f);
  threads = threads_for(threads, N, B, D);
  parallel_for(plan.items(), threads, [&](int64_t n, Workspace& ws) {
    const int64_t s = n % plan.splits, first = n / plan.splits * plan.block;
    const int64_t begin = std::min(s * plan.rows, B), end = std::min(begin + plan.rows, B);
    GradientItem item = gradient_item(p, g);
    item.lanes = {p.keys, nullptr, first, std::min(plan.block, N - first)};
    item.rows = {p.query, nullptr, begin, end - begin};
    if (groups) {
      item.query_group = groups->query_group.data();
      item.key_group = groups->key_group.data();
      item.group_is_positive = !p.positive;
    }
    item.positive = p.positive;
    if (split) {
      item.out = dkeys ? sums.data() + s * N * D : nullptr;
      item.out_bias = dbias ? bias.data() + s * N : nullptr;
    } else {
      item.out_scaled = dkeys;
      item.out_bias = dbias;
    }
    k.gradient(item, ws);
  });
  if (!split) return;
  parallel_for((N + plan.block - 1) / plan.block, threads, [&](int64_t n, Workspace&) {
    for (int64_t j = n * plan.block; j < std::min(N, (n + 1) * plan.block); ++j) {
      for (int64_t s = 0; dbias && s < plan.splits; ++s) dbias[j] += bias[s * N + j];
      if (!dkeys) continue;
      float* total = sums.data() + j * D;
      for (int64_t s = 1; s < plan.splits; ++s)
        for (int64_t d = 0; d < D; ++d) total[d] += sums[(s * N + j) * D + d];
      k.store_row(dkeys, p.keys.dtype, j, total, D, p.scale);
    }
  });
}

}  // namespace fastcompat
