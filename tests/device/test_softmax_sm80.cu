// Softmax statistics and gradients of the portable tier against the formulas in float64. The rule: the error is at most
// twice that of the eager expression in the same dtype (every product's operands and result rounded to it), plus a few
// roundings of the largest number met.
#include <memory>

#include "../../csrc/cuda/softmax_sm80.cu"
#include "device_test.h"

using namespace fastcompat;
using namespace fastcompat::cuda;
using device_test::Buffer;
using device_test::expect;
using device_test::expect_close;
using device_test::progress;
using device_test::same_bits;

namespace {

constexpr double kInfinity = INFINITY;
enum Labels { kNone, kFew, kMany, kSingle, kNegative };

struct Case {
  int B, N, D;
  DType dtype = DType::bf16;
  Precision precision = Precision::exact;
  Labels labels = kNone;
  bool bias = false, positive = false, exclude = false;
  int padding = 0, offset = 0;  // elements: row stride - D, and how far the first row lies from an aligned address
  float scale = 8.0f;
};

float rounded(float x, DType dtype) {
  if (dtype == DType::bf16) return float(bf16(x));
  if (dtype == DType::f16) return float(fp16(x));
  return x;
}
// A float as the unit that multiplies in this precision sees it; "high" may be as coarse as TF32.
float operand(float x, DType dtype, Precision precision) {
  if (dtype != DType::f32) return rounded(x, dtype);
  if (precision == Precision::fast) return float(bf16(x));
  if (precision == Precision::exact) return x;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x1000) & 0xffffe000u;
  memcpy(&x, &bits, 4);
  return x;
}

// Rows in device memory in their own dtype and stride, and their values.
struct Rows {
  std::vector<float> value;  // [rows, D]
  std::unique_ptr<Buffer<uint8_t>> memory;
  Matrix matrix;

  Rows(int rows, const Case& c, unsigned seed) : value(size_t(rows) * c.D) {
    const int size = c.dtype == DType::f32 ? 4 : 2, stride = c.D + c.padding;
    const auto random = device_test::normal<float>(value.size(), seed, 1 / std::sqrt(float(c.D)));
    std::vector<uint8_t> bytes((size_t(rows) * stride + c.offset) * size, 0xff);
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < c.D; ++d) {
        float& x = value[size_t(i) * c.D + d];
        x = rounded(random[size_t(i) * c.D + d], c.dtype);
        uint8_t* to = bytes.data() + (size_t(i) * stride + c.offset + d) * size;
        const bf16 b(x);
        const fp16 h(x);
        memcpy(to, c.dtype == DType::f32 ? (const void*)&x : c.dtype == DType::bf16 ? (const void*)&b : &h, size);
      }
    memory = std::make_unique<Buffer<uint8_t>>(bytes);
    matrix = {memory->data() + c.offset * size, c.dtype, rows, c.D, stride};
  }
  const float* operator[](int i) const {
    return value.data() + size_t(i) * (value.size() / std::max<int64_t>(1, matrix.rows));
  }
};

// What a call returns, in double: from the formulas, or from the eager expression with its roundings.
struct Results {
  std::vector<double> neg_lse, pos_lse, pos_sum, count, mean, dquery, dscale, dkeys, dbias;
};

struct Setup {
  Case c;
  Rows query, keys;
  std::vector<float> bias, g_neg, g_pos, g_sum, factor;
  std::vector<int64_t> query_labels, key_labels, positive, exclude;
  bool none_arrives = false;  // of g_neg

  explicit Setup(const Case& c) : c(c), query(c.B, c, 1), keys(c.N, c, 2) {
    std::mt19937 random(3);
    auto number = [&](int n) { return n > 0 ? int64_t(random() % n) : int64_t{-1}; };
    bias = device_test::normal<float>(c.N, 4);
    g_neg = device_test::normal<float>(c.B, 5);
    g_pos = device_test::normal<float>(c.B, 6);
    g_sum = device_test::normal<float>(c.B, 7, 0.1f);
    factor = {1.25f};
    const int classes = c.labels == kFew        ? 2
                        : c.labels == kSingle   ? 1
                        : c.labels == kNegative ? 3
                                                : std::max(2, c.N / 2);
    for (int i = 0; i < c.B; ++i)
      query_labels.push_back(c.labels == kNegative && i % 2 ? -2 + i % 4 / 2 : number(classes));
    for (int j = 0; j < c.N; ++j)
      key_labels.push_back(c.labels == kNegative && j % 3 == 0 ? -1 - j % 2 : number(classes));
    for (int i = 0; i < c.B; ++i) positive.push_back(i % 5 == 4 ? -1 : number(c.N));
    for (int i = 0; i < c.B; ++i) exclude.push_back(i % 7 == 6 ? -1 : i % 3 ? number(c.N) : positive[i]);
  }

  bool same(int i, int j) const {
    return c.labels != kNone && query_labels[i] >= 0 && query_labels[i] == key_labels[j];
  }
  bool chosen(int i, int j) const { return c.positive && positive[i] == j; }
  bool left_out(int i, int j) const { return c.exclude && exclude[i] == j; }
  bool is_positive(int i, int j) const { return !left_out(i, j) && (c.positive ? chosen(i, j) : same(i, j)); }
  bool is_negative(int i, int j) const { return !left_out(i, j) && !chosen(i, j) && !same(i, j); }

  Results truth() const { return expected<double>(DType::f32); }
  Results eager() const { return expected<float>(c.dtype, c.precision); }
  // 16-bit embeddings as floats, as the reference computes statistics.
  Results upcast() const { return expected<float>(DType::f32, c.precision); }

  // R: double for the truth, float for the eager expression, whose products round operands and results.
  template <class R>
  Results expected(DType dtype, Precision precision = Precision::exact) const {
    constexpr bool eager = std::is_same_v<R, float>;
    const int B = c.B, N = c.N, D = c.D;
    auto in = [&](R x) { return eager ? R(operand(float(x), dtype, precision)) : x; };
    auto out = [&](R x) { return eager ? R(rounded(float(x), dtype)) : x; };
    const R scale = R(c.scale) * factor[0];
    Results r;
    std::vector<R> z(size_t(B) * N), coefficient(size_t(B) * N);
    r.mean.assign(size_t(B) * D, 0);
    for (int i = 0; i < B; ++i) {
      R sums[2] = {0, 0}, tops[2] = {-R(kInfinity), -R(kInfinity)}, sum = 0;
      int counts[2] = {0, 0};
      for (int j = 0; j < N; ++j) {
        R dot = 0;
        for (int d = 0; d < D; ++d) dot += in(query[i][d]) * in(keys[j][d]);
        R& zij = z[size_t(i) * N + j] = out(scale * out(dot));
        if (c.bias) zij = out(zij + bias[j]);
        for (int p = 0; p < 2; ++p)
          if (p ? is_positive(i, j) : is_negative(i, j)) tops[p] = std::max(tops[p], zij), ++counts[p];
        if (is_positive(i, j)) sum += zij;
      }
      R lse[2];
      for (int p = 0; p < 2; ++p) {
        for (int j = 0; j < N; ++j)
          if (p ? is_positive(i, j) : is_negative(i, j)) sums[p] += std::exp(z[size_t(i) * N + j] - tops[p]);
        lse[p] = counts[p] ? tops[p] + std::log(sums[p]) : -R(kInfinity);
      }
      r.neg_lse.push_back(out(lse[0]));
      r.pos_lse.push_back(out(lse[1]));
      r.pos_sum.push_back(out(sum));
      r.count.push_back(counts[1]);
      std::vector<R> mean(D), u(D);
      for (int j = 0; j < N; ++j) {
        R& cij = coefficient[size_t(i) * N + j];
        const R p = out(std::exp(z[size_t(i) * N + j] - lse[is_positive(i, j)]));
        if (is_negative(i, j)) {
          cij = none_arrives ? 0 : g_neg[i] * p;
          for (int d = 0; d < D; ++d) mean[d] += in(p) * in(keys[j][d]);
        } else if (is_positive(i, j)) {
          cij = g_pos[i] * p + g_sum[i];
        }
        cij = out(cij);
        for (int d = 0; d < D; ++d) u[d] += in(cij) * in(keys[j][d]);
      }
      R dscale = 0;
      for (int d = 0; d < D; ++d) {
        r.mean[size_t(i) * D + d] = out(mean[d]);
        r.dquery.push_back(out(scale * out(u[d])));
        dscale += query[i][d] * out(u[d]);
      }
      r.dscale.push_back(out(dscale));
    }
    for (int j = 0; j < N; ++j) {
      R sum = 0;
      std::vector<R> u(D);
      for (int i = 0; i < B; ++i) {
        sum += coefficient[size_t(i) * N + j];
        for (int d = 0; d < D; ++d) u[d] += in(coefficient[size_t(i) * N + j]) * in(query[i][d]);
      }
      r.dbias.push_back(out(sum));
      for (int d = 0; d < D; ++d) r.dkeys.push_back(out(scale * out(u[d])));
    }
    return r;
  }
};

template <class T>
std::vector<double> doubles(const std::vector<T>& v) {
  return std::vector<double>(v.begin(), v.end());
}
std::vector<double> numbers(const Buffer<uint8_t>& memory, DType dtype) {
  const std::vector<uint8_t> bytes = same_bits(memory);
  std::vector<double> out;
  for (size_t at = 0; at < bytes.size();) {
    float f;
    bf16 b;
    fp16 h;
    memcpy(&f, &bytes[at], dtype == DType::f32 ? 4 : 0);
    memcpy(&b, &bytes[at], 2);
    memcpy(&h, &bytes[at], 2);
    out.push_back(dtype == DType::f32 ? f : dtype == DType::bf16 ? float(b) : float(h));
    at += dtype == DType::f32 ? 4 : 2;
  }
  return out;
}

void compare(const char* what, const std::vector<double>& got, const std::vector<double>& eager,
             const std::vector<double>& truth, double floor) {
  expect(got.size() == truth.size(), "%s: %zu numbers, not %zu", what, got.size(), truth.size());
  double worst = 0;
  for (size_t i = 0; i < truth.size(); ++i)
    if (std::isfinite(eager[i]) && std::isfinite(truth[i])) worst = std::fmax(worst, std::fabs(eager[i] - truth[i]));
  for (size_t i = 0; i < truth.size(); ++i) expect_close(got[i], truth[i], 2 * worst + floor, what, long(i));
}

// Every kernel on one problem; scratch of exactly the size asked for.
Results run(const Setup& s, bool want_mean = true, const char* without = "") {
  const Case& c = s.c;
  const Buffer<float> bias(s.bias), factor(s.factor);
  const Buffer<int64_t> query_labels(s.query_labels), key_labels(s.key_labels), positive(s.positive),
      exclude(s.exclude);
  const SoftmaxProblem p{s.query.matrix,
                         s.keys.matrix,
                         c.scale,
                         c.bias ? bias.data() : nullptr,
                         c.labels ? query_labels.data() : nullptr,
                         c.labels ? key_labels.data() : nullptr,
                         c.positive ? positive.data() : nullptr,
                         c.exclude ? exclude.data() : nullptr};
  Launch launch{0, nullptr, c.precision, factor.data(), nullptr};
  Buffer<float> neg_lse(c.B), pos_lse(c.B), pos_sum(c.B), mean(want_mean ? size_t(c.B) * c.D : 0), dscale(c.B),
      dbias(c.N);
  Buffer<int64_t> count(c.B);
  Results r;
  const SoftmaxStats stats{neg_lse.data(), pos_lse.data(), pos_sum.data(), count.data(),
                           want_mean ? mean.data() : nullptr};
  {
    const Buffer<uint8_t> scratch(sm80::softmax_stats_scratch(p, want_mean, launch));
    launch.scratch = scratch.data();
    sm80::softmax_stats(p, stats, launch);
  }
  r.neg_lse = doubles(same_bits(neg_lse));
  r.pos_lse = doubles(same_bits(pos_lse));
  r.pos_sum = doubles(same_bits(pos_sum));
  r.count = doubles(same_bits(count));
  r.mean = doubles(same_bits(mean));
  if (!want_mean) return r;

  // NaN arrives at rows whose set is empty.
  auto arriving = [&](std::vector<float> g, const std::vector<double>& lse) {
    for (int i = 0; i < c.B; ++i)
      if (lse[i] == -kInfinity) g[i] = NAN;
    return g;
  };
  const Buffer<float> g_neg(arriving(s.g_neg, r.neg_lse)), g_pos(arriving(s.g_pos, r.pos_lse)),
      g_sum(arriving(s.g_sum, r.pos_lse));
  const SoftmaxGrads grads{neg_lse.data(), pos_lse.data(), s.none_arrives ? nullptr : g_neg.data(), g_pos.data(),
                           g_sum.data()};
  const size_t size = c.dtype == DType::f32 ? 4 : 2;
  const bool want_keys = std::string(without) != "dkeys", want_bias = std::string(without) != "dbias";
  const Buffer<uint8_t> dquery(size * c.B * c.D), dkeys(want_keys ? size * c.N * c.D : 0);
  {
    const Buffer<uint8_t> scratch(sm80::softmax_query_grad_scratch(p, grads, launch));
    launch.scratch = scratch.data();
    sm80::softmax_query_grad(p, grads, mean.data(), dquery.data(), dscale.data(), launch);
  }
  {
    const Buffer<uint8_t> scratch(sm80::softmax_key_grad_scratch(p, grads, want_keys, want_bias, launch));
    launch.scratch = scratch.data();
    sm80::softmax_key_grad(p, grads, want_keys ? dkeys.data() : nullptr, want_bias ? dbias.data() : nullptr, launch);
  }
  r.dquery = numbers(dquery, c.dtype);
  r.dscale = doubles(same_bits(dscale));
  r.dkeys = numbers(dkeys, c.dtype);
  if (want_bias) r.dbias = doubles(same_bits(dbias));
  return r;
}

void check(const Setup& s) {
  const Results got = run(s), eager = s.eager(), upcast = s.upcast(), truth = s.truth();
  const double eps = std::ldexp(1.0, -23), z = 4.0 * s.c.scale;
  compare("neg_lse", got.neg_lse, upcast.neg_lse, truth.neg_lse, eps * z);
  compare("pos_lse", got.pos_lse, upcast.pos_lse, truth.pos_lse, eps * z);
  compare("pos_sum", got.pos_sum, upcast.pos_sum, truth.pos_sum, eps * z);
  compare("count", got.count, truth.count, truth.count, 0);
  compare("mean", got.mean, eager.mean, truth.mean, 2 * eps);
  compare("dquery", got.dquery, eager.dquery, truth.dquery, 2 * eps * s.c.scale);
  compare("dscale", got.dscale, eager.dscale, truth.dscale, 2 * eps);
  compare("dkeys", got.dkeys, eager.dkeys, truth.dkeys, 2 * eps * s.c.scale);
  compare("dbias", got.dbias, eager.dbias, truth.dbias, 2 * eps);
  const Results alone = run(s, false);
  compare("neg_lse alone", alone.neg_lse, upcast.neg_lse, truth.neg_lse, eps * z);
  compare("pos_lse alone", alone.pos_lse, upcast.pos_lse, truth.pos_lse, eps * z);
  compare("pos_sum alone", alone.pos_sum, upcast.pos_sum, truth.pos_sum, eps * z);
}
void check(const Case& c) { check(Setup(c)); }

}  // namespace

// {B, N, D}: one tile and its tails; wide and narrow tiles; more than one split; more than one slice of the columns.
DEVICE_TEST(bf16_sizes) {
  for (const Case& c : {Case{1, 1, 1}, Case{3, 65, 7}, Case{65, 63, 64}, Case{66, 200, 100}, Case{130, 130, 129}})
    check(c);
}

DEVICE_TEST(bf16_splits) {
  for (Case c : {Case{9, 1100, 40}, Case{70, 600, 24}, Case{600, 20, 24}}) {
    c.labels = kMany;
    c.bias = true;
    check(c);
  }
}

DEVICE_TEST(bf16_many_columns) {
  for (Case c : {Case{20, 70, 264}, Case{70, 40, 520}, Case{3, 5, 1030}}) {
    c.labels = kFew;
    check(c);
  }
}

DEVICE_TEST(fp16_sizes) {
  for (Case c : {Case{1, 3, 8}, Case{67, 129, 33}, Case{10, 70, 130}}) {
    c.dtype = DType::f16;
    c.exclude = true;
    check(c);
  }
}

// Gradients from 1e-12 to 1e9 meet fp16's narrow range.
DEVICE_TEST(fp16_scales_of_gradients) {
  for (const float size : {1e-12f, 3e-6f, 1e4f, 1e9f}) {
    Case c{20, 70, 16, DType::f16};
    c.labels = kFew;
    Setup s(c);
    for (auto* g : {&s.g_neg, &s.g_pos, &s.g_sum})
      for (float& x : *g) x *= size;
    const Results got = run(s), truth = s.truth();
    double largest = 0;
    for (const double x : truth.dbias) largest = std::fmax(largest, std::fabs(x));
    compare("dbias", got.dbias, truth.dbias, truth.dbias, 1e-3 * largest);
    for (size_t i = 0; i < truth.dkeys.size(); ++i)
      if (std::fabs(truth.dkeys[i]) < 6e4)
        expect_close(got.dkeys[i], truth.dkeys[i], 2e-3 * largest * c.scale + 3e-8, "dkeys", long(i));
  }
}

DEVICE_TEST(fp32_exact) {
  for (Case c : {Case{1, 2, 3}, Case{66, 130, 67}, Case{5, 70, 400}}) {
    c.dtype = DType::f32;
    c.labels = kFew;
    check(c);
  }
}

DEVICE_TEST(fp32_high_and_fast) {
  for (const Precision precision : {Precision::high, Precision::fast}) {
    Case c{67, 70, 65, DType::f32, precision};
    c.labels = kMany;
    check(c);
  }
}

DEVICE_TEST(members) {
  for (const Labels labels : {kNone, kFew, kMany, kSingle, kNegative})
    for (int options = 0; options < 8; options += labels == kNone || labels == kFew ? 1 : 3) {
      Case c{37, 75, 24};
      c.labels = labels;
      c.bias = options & 1;
      c.positive = options & 2;
      c.exclude = options & 4;
      check(c);
    }
}

DEVICE_TEST(strides) {
  for (const DType dtype : {DType::bf16, DType::f32})
    for (const int padding : {3, 8})
      for (const int offset : {0, 1, 8}) {
        Case c{5, 70, 24, dtype};
        c.padding = padding;
        c.offset = offset;
        c.labels = kMany;
        check(c);
      }
}

// Every query meets the same key row and the other way round: a stride of 0.
DEVICE_TEST(stride_zero) {
  Case c{5, 70, 24};
  Setup s(c);
  s.keys.matrix.stride = 0;
  for (size_t i = c.D; i < s.keys.value.size(); ++i) s.keys.value[i] = s.keys.value[i - c.D];
  check(s);
}

DEVICE_TEST(empty) {
  for (Case c : {Case{0, 5, 8}, Case{5, 0, 8}, Case{0, 0, 8}, Case{130, 0, 8}}) {
    c.labels = kFew;
    check(c);
  }
}

// A caller who wants less gets the same of what is left.
DEVICE_TEST(outputs_left_out) {
  for (const Labels labels : {kNone, kMany})
    for (const bool positive : {false, true}) {
      Case c{40, 300, 24};
      c.labels = labels;
      c.positive = positive;
      Setup s(c);
      const Results all = run(s), truth = s.truth();
      compare("dbias", run(s, true, "dkeys").dbias, all.dbias, all.dbias, 0);
      compare("dkeys", run(s, true, "dbias").dkeys, all.dkeys, all.dkeys, 0);
      s.none_arrives = true;
      check(s);
    }
}

// Tiles without a positive are skipped, the ones with one are found wherever it lies.
DEVICE_TEST(rare_positives) {
  Case c{70, 900, 16};
  c.labels = kMany;
  Setup s(c);
  s.none_arrives = true;
  for (auto& label : s.key_labels) label = -1;
  for (const int j : {0, 63, 64, 127, 500, 899}) s.key_labels[j] = s.query_labels[j % c.B];
  check(s);
}

DEVICE_TEST(index_out_of_range) {
  for (const bool of_positive : {true, false})
    for (const int64_t bad : {int64_t{-2}, int64_t{75}, int64_t{1} << 40, -(int64_t{1} << 62)}) {
      Case c{37, 75, 24};
      c.positive = c.exclude = true;
      Setup s(c);
      const Results good = run(s);
      (of_positive ? s.positive : s.exclude)[11] = bad;
      const Results got = run(s);
      for (int i = 0; i < c.B; ++i) {
        expect_close(got.neg_lse[i], i == 11 ? NAN : good.neg_lse[i], 0, "neg_lse", i);
        expect_close(got.pos_lse[i], i == 11 ? NAN : good.pos_lse[i], 0, "pos_lse", i);
        expect_close(got.dscale[i], i == 11 ? NAN : good.dscale[i], 0, "dscale", i);
        for (int d = 0; d < c.D; ++d) {
          const size_t at = size_t(i) * c.D + d;
          expect_close(got.mean[at], i == 11 ? NAN : good.mean[at], 0, "mean", i, d);
          expect_close(got.dquery[at], i == 11 ? NAN : good.dquery[at], 0, "dquery", i, d);
        }
      }
    }
}

// Logits of thousands, in rising order: the maximum moves with every tile.
DEVICE_TEST(large_logits) {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    Case c{5, 700, 4, dtype};
    c.scale = 1.0f;
    c.bias = true;
    Setup s(c);
    for (int j = 0; j < c.N; ++j) s.bias[j] = 4.0f * float(j) - 1000;
    const Results got = run(s), truth = s.truth();
    compare("neg_lse", got.neg_lse, truth.neg_lse, truth.neg_lse, 2e-4);
    compare("mean", got.mean, truth.mean, truth.mean, dtype == DType::f32 ? 1e-3 : 8e-3);
  }
}
