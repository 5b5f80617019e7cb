// The native interface by itself, against double precision, on every instruction set of this machine. Built with
// AddressSanitizer and UndefinedBehaviorSanitizer: inputs are heap blocks of exactly their size, so a read past a row
// is seen.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "fastcompat.h"

using namespace fastcompat;

namespace {

int checks = 0, failures = 0;

void expect(bool ok, const char* what, int64_t B, int64_t N, int64_t D, DType type) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: B=%ld N=%ld D=%ld dtype=%d simd=%s\n", what, long(B), long(N), long(D), int(type),
              simd().c_str());
}

std::mt19937 random_bits(7);

// A matrix whose rows are `stride` apart and whose block ends with its last element; values are exact in bf16 and f16.
struct Embeddings {
  std::unique_ptr<char[]> storage;
  Matrix matrix;
  std::vector<double> values;  // [rows, dim]

  Embeddings(DType type, int64_t rows, int64_t dim, int64_t stride) : values(rows * dim) {
    const int64_t size = type == DType::f32 ? 4 : 2, count = rows ? (rows - 1) * stride + dim : 0;
    storage.reset(new char[count * size]);
    matrix = {storage.get(), type, rows, dim, stride};
    std::uniform_int_distribution<int> eighths(-8, 8);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < dim; ++d) {
        const float value = static_cast<float>(eighths(random_bits)) / 8;
        values[r * dim + d] = value;
        char* at = storage.get() + (r * stride + d) * size;
        uint32_t u;
        std::memcpy(&u, &value, 4);
        uint16_t half = static_cast<uint16_t>(u >> 16);
        if (type == DType::f16)  // eighths are normal in f16
          half =
              value == 0 ? 0 : static_cast<uint16_t>(((u >> 16) & 0x8000u) | (((u & 0x7fffffffu) - 0x38000000u) >> 13));
        if (type == DType::f32)
          std::memcpy(at, &value, 4);
        else
          std::memcpy(at, &half, 2);
      }
  }
  double dot(int64_t i, const Embeddings& other, int64_t j) const {
    double sum = 0;
    for (int64_t d = 0; d < matrix.dim; ++d) sum += values[i * matrix.dim + d] * other.values[j * matrix.dim + d];
    return sum;
  }
};

std::vector<int64_t> random_indices(int64_t count, int64_t low, int64_t high) {
  std::uniform_int_distribution<int64_t> any(low, high);
  std::vector<int64_t> out(count);
  for (int64_t& x : out) x = any(random_bits);
  return out;
}

double read(const void* data, DType type, int64_t at) {
  if (type == DType::f32) return static_cast<const float*>(data)[at];
  const uint16_t h = static_cast<const uint16_t*>(data)[at];
  if (type == DType::bf16) {
    const uint32_t u = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  const int exponent = (h >> 10) & 31;
  const double magnitude = exponent ? std::ldexp(1024 + (h & 1023), exponent - 25) : std::ldexp(h & 1023, -24);
  return h & 0x8000 ? -magnitude : magnitude;
}

bool close(double got, double want, double size, double relative) {
  if (std::isinf(want)) return got == want;
  return std::abs(got - want) <= relative * (std::abs(want) + size);
}

void softmax_case(DType type, int64_t B, int64_t N, int64_t D, int kind, int threads) {
  const Embeddings q(type, B, D, D + 3), k(type, N, D, D);
  const bool by_label = kind == 1 || kind == 2, by_index = kind == 2 || kind == 3;
  const auto query_labels = random_indices(B, -1, 3), key_labels = random_indices(N, -1, 3);
  const auto positive = random_indices(B, -1, N - 1), exclude = random_indices(B, -1, N - 1);
  std::vector<float> bias(N), g(3 * B);
  for (float& b : bias) b = static_cast<float>(random_bits() % 16) / 8;
  for (float& x : g) x = static_cast<float>(random_bits() % 16) / 16;
  const double scale = 0.75;
  const SoftmaxProblem p{q.matrix,
                         k.matrix,
                         0.75f,
                         kind ? bias.data() : nullptr,
                         by_label ? query_labels.data() : nullptr,
                         by_label ? key_labels.data() : nullptr,
                         by_index ? positive.data() : nullptr,
                         kind > 1 ? exclude.data() : nullptr};
  std::vector<float> neg(B), pos(B), sum(B), mean(B * D), dscale(B), dbias(N);
  std::vector<int64_t> count(B);
  std::unique_ptr<char[]> dquery(new char[B * D * 4]), dkeys(new char[N * D * 4]);
  softmax_stats(p, {neg.data(), pos.data(), sum.data(), count.data(), mean.data()}, threads);
  const SoftmaxGrads grads{neg.data(), pos.data(), g.data(), g.data() + B, g.data() + 2 * B};
  softmax_query_grad(p, grads, mean.data(), dquery.get(), dscale.data(), threads);
  softmax_key_grad(p, grads, dkeys.get(), dbias.data(), threads);

  float loss = 0;
  std::unique_ptr<char[]> loss_dquery(new char[B * D * 4]), loss_dkeys(new char[N * D * 4]);
  softmax_loss(p, false, &loss, loss_dquery.get(), loss_dkeys.get(), threads);

  double want_loss = 0;
  std::vector<double> want_dk(N * D), want_db(N), want_loss_dk(N * D);
  const double loose = type == DType::f32 ? 2e-5 : 2e-2;  // bf16 weights and outputs
  bool stats_ok = true, query_ok = true, loss_ok = true;
  for (int64_t i = 0; i < B; ++i) {
    std::vector<double> z(N);
    std::vector<int> role(N);  // 1 negative, 2 positive
    double neg_sum = 0, pos_exp = 0, pos_sum = 0, positives = 0;
    for (int64_t j = 0; j < N; ++j) {
      z[j] = scale * q.dot(i, k, j) + (p.bias ? bias[j] : 0);
      const bool same = by_label && query_labels[i] >= 0 && query_labels[i] == key_labels[j];
      const bool chosen = by_index ? positive[i] == j : same;
      role[j] = p.exclude && exclude[i] == j ? 0 : chosen ? 2 : same ? 0 : 1;
      if (role[j] == 1) neg_sum += std::exp(z[j]);
      if (role[j] == 2) pos_exp += std::exp(z[j]), pos_sum += z[j], ++positives;
    }
    stats_ok &= close(neg[i], std::log(neg_sum), 1, 1e-5) && close(pos[i], std::log(pos_exp), 1, 1e-5) &&
                close(sum[i], pos_sum, 10, 1e-5) && count[i] == positives;
    const double odds = neg_sum / pos_exp, slope = positives ? 1 / (1 + 1 / odds) : 0;
    want_loss += positives ? std::log1p(odds) : 0;
    std::vector<double> u(D), loss_u(D);
    for (int64_t j = 0; j < N; ++j) {
      if (!role[j]) continue;
      const double e = slope * std::exp(z[j]), loss_c = slope == 0 ? 0 : role[j] == 1 ? e / neg_sum : -e / pos_exp;
      const double c =
          role[j] == 1 ? g[i] * std::exp(z[j]) / neg_sum : g[B + i] * std::exp(z[j]) / pos_exp + g[2 * B + i];
      want_db[j] += c;
      for (int64_t d = 0; d < D; ++d) {
        u[d] += c * k.values[j * D + d];
        want_dk[j * D + d] += scale * c * q.values[i * D + d];
        loss_u[d] += loss_c * k.values[j * D + d];
        want_loss_dk[j * D + d] += scale * loss_c * q.values[i * D + d];
      }
    }
    for (int64_t d = 0; d < D; ++d) {
      query_ok &= close(read(dquery.get(), type, i * D + d), scale * u[d], 1 + positives, loose);
      loss_ok &= close(read(loss_dquery.get(), type, i * D + d), scale * loss_u[d], 1, loose);
    }
  }
  bool keys_ok = true;
  for (int64_t j = 0; j < N; ++j) {
    keys_ok &= close(dbias[j], want_db[j], B, 2e-5);
    for (int64_t d = 0; d < D; ++d) {
      keys_ok &= close(read(dkeys.get(), type, j * D + d), want_dk[j * D + d], 1 + B, loose);
      loss_ok &= close(read(loss_dkeys.get(), type, j * D + d), want_loss_dk[j * D + d], 1 + B, loose);
    }
  }
  expect(stats_ok, "softmax_stats", B, N, D, type);
  expect(query_ok, "softmax_query_grad", B, N, D, type);
  expect(keys_ok, "softmax_key_grad", B, N, D, type);
  expect(loss_ok && close(loss, want_loss, B, 1e-5), "softmax_loss", B, N, D, type);
}

// Values are eighths, so that inner products are exact and ties abound: ids must match a stable sort exactly.
void search_case(DType type, int64_t B, int64_t N, int64_t D, int64_t k, int threads) {
  const Embeddings q(type, B, D, D), keys(type, N, D, D + 5);
  const auto query_labels = random_indices(B, -1, 3), key_labels = random_indices(N, -1, 3);
  const auto exclude = random_indices(B, -1, N - 1);
  std::vector<int64_t> odd, even;
  for (int64_t j = 0; j < N; ++j) (j % 3 ? even : odd).push_back(j);
  const int64_t n_odd = static_cast<int64_t>(odd.size()), n_even = static_cast<int64_t>(even.size());
  const std::vector<Segment> whole = {{q.matrix, keys.matrix, nullptr, N, 1, 0}};
  const std::vector<Segment> halves = {{q.matrix, keys.matrix, odd.data(), n_odd, 1, 0},
                                       {q.matrix, keys.matrix, even.data(), n_even, 1, 0}};
  for (Metric metric : {Metric::ip, Metric::l2}) {
    std::vector<float> packed(packed_size(keys.matrix, N, metric));
    const std::vector<Segment> from_packed = {
        {q.matrix, keys.matrix, nullptr, N, 1, 0, packed.empty() ? nullptr : packed.data()}};
    if (!packed.empty()) {
      std::vector<float> over_ones(packed.size());
      std::memset(over_ones.data(), 0xff, over_ones.size() * sizeof(float));
      pack(whole[0], metric, packed.data(), threads);
      pack(whole[0], metric, over_ones.data(), threads);
      expect(std::memcmp(packed.data(), over_ones.data(), packed.size() * sizeof(float)) == 0, "pack, every number", B,
             N, D, type);
    }
    for (const auto* segments : {&whole, &halves, &from_packed}) {
      std::vector<float> scores(B * k);
      std::vector<int64_t> ids(B * k), beats(B * k), bounds = {0, N / 3, N / 3, N}, counts(B * k * 3);
      topk(*segments, k, metric, {query_labels.data(), key_labels.data(), exclude.data()}, scores.data(), ids.data(),
           threads);
      bool ok = true;
      for (int64_t i = 0; i < B; ++i) {
        std::vector<std::pair<double, int64_t>> all;  // (-score, id)
        for (int64_t j = 0; j < N; ++j) {
          if (exclude[i] == j || (query_labels[i] >= 0 && query_labels[i] == key_labels[j])) continue;
          double score = q.dot(i, keys, j);
          if (metric == Metric::l2) score = 2 * score - q.dot(i, q, i) - keys.dot(j, keys, j);
          all.push_back({-score, j});
        }
        std::sort(all.begin(), all.end());
        for (int64_t r = 0; r < k; ++r) {
          const bool filled = r < static_cast<int64_t>(all.size());
          ok &= ids[i * k + r] == (filled ? all[r].second : -1);
          ok &= scores[i * k + r] == (filled ? static_cast<float>(-all[r].first) : -INFINITY);
        }
      }
      expect(ok, "topk", B, N, D, type);
      std::vector<float> pairs(B * k);
      pair_scores(whole[0], metric, ids.data(), k, pairs.data(), threads);
      expect(std::equal(pairs.begin(), pairs.end(), scores.begin()), "pair_scores", B, N, D, type);
      // Without labels in the way, the r-th best of an unfiltered search is beaten by r keys.
      topk(*segments, k, metric, {nullptr, nullptr, exclude.data()}, scores.data(), ids.data(), threads);
      count_beats(whole[0], metric, bounds.data(), 3, scores.data(), ids.data(), k, exclude.data(), counts.data(),
                  threads);
      bool ranks_ok = true;
      for (int64_t n = 0; n < B * k; ++n)
        ranks_ok &= counts[3 * n] + counts[3 * n + 1] + counts[3 * n + 2] == (ids[n] < 0 ? 0 : n % k);
      expect(ranks_ok, "count_beats", B, N, D, type);
    }
  }
}

template <class Error, class Fn>
void expect_throw(const char* what, Fn&& fn) {
  bool thrown = false;
  try {
    fn();
  } catch (const Error&) {
    thrown = true;
  }
  expect(thrown, what, 0, 0, 0, DType::f32);
}

void errors() {
  Embeddings q(DType::f32, 2, 3, 3), k(DType::f32, 4, 3, 3);
  std::vector<int64_t> positive = {0, 4}, ids(4), count(2);
  std::vector<float> out(16);
  const SoftmaxProblem p{q.matrix, k.matrix, 1, nullptr, nullptr, nullptr, positive.data(), nullptr};
  expect_throw<std::invalid_argument>(
      "index out of range", [&] { softmax_stats(p, {out.data(), out.data(), out.data(), count.data(), nullptr}, 2); });
  reinterpret_cast<float*>(k.storage.get())[7] = NAN;
  expect_throw<NonFinite>("NaN key", [&] {
    topk({{q.matrix, k.matrix, nullptr, 4, 1, 0}}, 2, Metric::cosine, {nullptr, nullptr, nullptr}, out.data(),
         ids.data(), 2);
  });
}

void threads_and_fork() {
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([] {
      for (int n = 0; n < 3; ++n) {
        std::vector<float> q(70 * 96), out(70 * 5);
        std::vector<int64_t> ids(70 * 5);
        for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i * 7 % 13);
        const Matrix m{q.data(), DType::f32, 70, 96, 96};
        topk({{m, m, nullptr, 70, 1, 0}}, 5, Metric::l2, {nullptr, nullptr, nullptr}, out.data(), ids.data(), 3);
      }
    });
  for (std::thread& t : callers) t.join();
  const pid_t child = fork();
  if (child == 0) {
    softmax_case(DType::f32, 200, 3000, 33, 1, 2);
    std::_Exit(failures != 0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "after fork", 200, 3000, 33, DType::f32);
}

}  // namespace

int main() {
  for (const std::string& level : simd_levels()) {
    set_simd(level);
    const int before = checks;
    for (DType type : {DType::f32, DType::bf16, DType::f16}) {
      for (int kind = 0; kind < 4; ++kind)
        for (auto [B, N, D] : {std::tuple<int, int, int>{1, 1, 1}, {3, 31, 5}, {33, 70, 64}, {65, 300, 131}})
          softmax_case(type, B, N, D, kind, 2);
      softmax_case(type, 40, 5000, 17, 1, 2);
      softmax_case(type, 700, 5000, 17, 2, 2);  // two passes, two parts of the keys
      softmax_case(type, 5000, 40, 17, 1, 2);
      for (auto [B, N, D, k] : {std::tuple<int, int, int, int>{1, 1, 1, 3},
                                {5, 40, 7, 5},
                                {33, 300, 65, 20},
                                {3, 9000, 12, 700},
                                {5, 1200, 33, 4},
                                {70, 1500, 131, 9}})
        search_case(type, B, N, D, k, 2);
    }
    errors();
    threads_and_fork();
    std::printf("%s: %d checks\n", level.c_str(), checks - before);
  }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
