// Every function of the native interface with several threads, from several callers at once, under ThreadSanitizer: no
// data race, and the bits of one thread alone. Problems are just large enough to be shared among threads.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <thread>

#include "fastcompat.h"

using namespace fastcompat;

namespace {

constexpr int kCallers = 3, kThreads = 3;

struct Rows {
  std::vector<float> values;
  Matrix matrix;

  Rows(int64_t rows, int64_t dim, int seed) : values(rows * dim) {
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    for (float& x : values) x = 0.3f * normal(bits);
    matrix = {values.data(), DType::f32, rows, dim, dim};
  }
};

std::vector<int64_t> indices(int64_t count, int64_t low, int64_t high, int seed) {
  std::mt19937 bits(seed);
  std::uniform_int_distribution<int64_t> any(low, high);
  std::vector<int64_t> out(count);
  for (int64_t& x : out) x = any(bits);
  return out;
}

using Result = std::vector<double>;

template <class T>
void append(Result& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

// ---- the softmax functions ----

struct Softmax {
  Rows query, keys;
  std::vector<float> bias, grads;
  std::vector<int64_t> query_labels, key_labels, positive, exclude;
  bool by_index;

  Softmax(int64_t B, int64_t N, int64_t D, bool by_index)
      : query(B, D, 1),
        keys(N, D, 2),
        bias(Rows(N, 1, 3).values),
        grads(Rows(3 * B, 1, 4).values),
        query_labels(indices(B, -1, 3, 5)),
        key_labels(indices(N, -1, 3, 6)),
        positive(indices(B, -1, N - 1, 7)),
        exclude(indices(B, -1, N - 1, 8)),
        by_index(by_index) {}

  Result operator()(int threads) const {
    const int64_t B = query.matrix.rows, N = keys.matrix.rows, D = query.matrix.dim;
    const SoftmaxProblem p{query.matrix,
                           keys.matrix,
                           2,
                           bias.data(),
                           query_labels.data(),
                           key_labels.data(),
                           by_index ? positive.data() : nullptr,
                           exclude.data()};
    std::vector<float> neg(B), pos(B), sum(B), mean(B * D), dquery(B * D), dscale(B), dkeys(N * D), dbias(N), loss(1);
    std::vector<float> loss_dquery(B * D), loss_dkeys(N * D);
    std::vector<int64_t> count(B);
    softmax_stats(p, {neg.data(), pos.data(), sum.data(), count.data(), mean.data()}, threads);
    const SoftmaxGrads g{neg.data(), pos.data(), grads.data(), grads.data() + B, grads.data() + 2 * B};
    softmax_query_grad(p, g, mean.data(), dquery.data(), dscale.data(), threads);
    softmax_key_grad(p, g, dkeys.data(), dbias.data(), threads);
    softmax_loss(p, true, loss.data(), loss_dquery.data(), loss_dkeys.data(), threads);
    Result all;
    for (const auto* part :
         {&neg, &pos, &sum, &mean, &dquery, &dscale, &dkeys, &dbias, &loss, &loss_dquery, &loss_dkeys})
      append(all, *part);
    append(all, count);
    return all;
  }
};

// ---- the search functions ----

struct Search {
  Rows query, keys;
  std::vector<int64_t> query_labels, key_labels, exclude, odd, even;
  Metric metric;
  int64_t k;

  Search(int64_t B, int64_t N, int64_t D, int64_t k, Metric metric)
      : query(B, D, 11),
        keys(N, D, 12),
        query_labels(indices(B, -1, 3, 13)),
        key_labels(indices(N, -1, 3, 14)),
        exclude(indices(B, -1, N - 1, 15)),
        metric(metric),
        k(k) {
    for (int64_t j = 0; j < N; ++j) (j % 2 ? odd : even).push_back(j);
  }

  Segment whole() const { return {query.matrix, keys.matrix, nullptr, keys.matrix.rows, 1, 0}; }

  void best(const std::vector<Segment>& segments, int threads, Result& all) const {
    const int64_t B = query.matrix.rows;
    std::vector<float> scores(B * k);
    std::vector<int64_t> ids(B * k);
    topk(segments, k, metric, {query_labels.data(), key_labels.data(), exclude.data()}, scores.data(), ids.data(),
         threads);
    append(all, scores);
    append(all, ids);
  }

  Result operator()(int threads) const {
    const int64_t B = query.matrix.rows, N = keys.matrix.rows;
    Result all;
    best({whole()}, threads, all);
    best({{query.matrix, keys.matrix, odd.data(), static_cast<int64_t>(odd.size()), 1, 0},
          {query.matrix, keys.matrix, even.data(), static_cast<int64_t>(even.size()), 0.5f, 0.1f}},
         threads, all);
    std::vector<float> packed(packed_size(keys.matrix, N, metric));
    if (!packed.empty()) {
      Segment segment = whole();
      pack(segment, metric, packed.data(), threads);
      segment.packed = packed.data();
      best({segment}, threads, all);
    }
    const auto targets = indices(B * 20, -1, N - 1, 16);
    std::vector<float> bars(B * 20);
    const std::vector<int64_t> bounds = {0, N / 3, N / 3, N};
    std::vector<int64_t> counts(B * 20 * 3);
    pair_scores(whole(), metric, targets.data(), 20, bars.data(), threads);
    count_beats(whole(), metric, bounds.data(), 3, bars.data(), targets.data(), 20, exclude.data(), counts.data(),
                threads);
    append(all, bars);
    append(all, counts);
    return all;
  }
};

// Two bad rows in different parts: the first is named, whoever meets it first.
Result named_row(int threads) {
  Rows query(70, 33, 21), keys(9000, 33, 22);
  keys.values[8999 * 33] = NAN;
  keys.values[4000 * 33] = NAN;
  std::vector<float> scores(70 * 3);
  std::vector<int64_t> ids(70 * 3);
  try {
    topk({{query.matrix, keys.matrix, nullptr, 9000, 1, 0}}, 3, Metric::ip, {nullptr, nullptr, nullptr}, scores.data(),
         ids.data(), threads);
  } catch (const NonFinite& e) {
    return {static_cast<double>(e.row)};
  }
  return {-1};
}

// As bits: NaN differs from nothing here, and none is expected.
int failures = 0;

void check(const char* what, const std::function<Result(int)>& call) {
  const Result expected = call(1);
  std::atomic<int> different{0};
  std::vector<std::thread> callers;
  for (int n = 0; n < kCallers; ++n)
    callers.emplace_back([&] {
      if (call(kThreads) != expected) ++different;
    });
  for (std::thread& t : callers) t.join();
  if (!different) return;
  ++failures;
  std::printf("FAILED %s: %d of %d callers got other bits, simd=%s\n", what, different.load(), kCallers,
              simd().c_str());
}

}  // namespace

int main() {
  const Softmax by_label(70, 1500, 45, false), by_index(300, 500, 33, true);
  const Search few(4, 33000, 33, 3, Metric::ip), batch(70, 4000, 33, 3, Metric::l2),
      all(70, 2000, 33, 200, Metric::cosine);
  for (const std::string& level : simd_levels()) {
    set_simd(level);
    check("softmax, positives by label", by_label);
    check("softmax, positives by index", by_index);
    check("search of few queries", few);
    check("search of a batch", batch);
    check("search for many keys", all);
    check("NaN", named_row);
    std::printf("%s\n", level.c_str());
  }
  std::printf("%d failed\n", failures);
  return failures != 0;
}
