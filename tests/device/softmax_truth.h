// Problems for the tests of the softmax kernels, and what must come out: the formulas in float64, and the eager
// expression with its roundings, whose error sets the allowed one.
#pragma once
#include <memory>

#include "../../csrc/cuda/engine.h"
#include "../../csrc/fastcompat.h"
#include "device_test.h"

namespace softmax_truth {

using namespace fastcompat;
using namespace fastcompat::cuda;
using device_test::Buffer;
using device_test::expect;
using device_test::expect_close;
using device_test::same_bits;

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

#ifndef EMU_UNWATCHED  // on a GPU
#define EMU_UNWATCHED
#endif
// The truth's own products.
template <class R>
EMU_UNWATCHED R dot(const R* a, const R* b, int size) {
  R sum = 0;
  for (int d = 0; d < size; ++d) sum += a[d] * b[d];
  return sum;
}
template <class R>
EMU_UNWATCHED void add(R* sums, R factor, const R* row, int size) {
  for (int d = 0; d < size; ++d) sums[d] += factor * row[d];
}

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
  // Excluded, or a key that never counts.
  bool left_out(int i, int j) const {
    return (c.exclude && exclude[i] == j) || (c.bias && bias[j] == -std::numeric_limits<float>::infinity());
  }
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
    auto all = [&](const Rows& rows) {
      std::vector<R> out;
      for (int i = 0; i < rows.matrix.rows; ++i)
        for (int d = 0; d < D; ++d) out.push_back(in(rows[i][d]));
      return out;
    };
    const std::vector<R> q = all(query), k = all(keys);
    auto out = [&](R x) { return eager ? R(rounded(float(x), dtype)) : x; };
    const R scale = R(c.scale) * factor[0];
    Results r;
    std::vector<R> z(size_t(B) * N), coefficient(size_t(B) * N);
    r.mean.assign(size_t(B) * D, 0);
    for (int i = 0; i < B; ++i) {
      R sums[2] = {0, 0}, tops[2] = {-R(kInfinity), -R(kInfinity)}, sum = 0;
      int counts[2] = {0, 0};
      for (int j = 0; j < N; ++j) {
        R& zij = z[size_t(i) * N + j] = out(scale * out(dot(&q[size_t(i) * D], &k[size_t(j) * D], D)));
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
          add(mean.data(), in(p), &k[size_t(j) * D], D);
        } else if (is_positive(i, j)) {
          cij = g_pos[i] * p + g_sum[i];
        }
        cij = out(cij);
        add(u.data(), in(cij), &k[size_t(j) * D], D);
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
        add(u.data(), in(coefficient[size_t(i) * N + j]), &q[size_t(i) * D], D);
      }
      r.dbias.push_back(out(sum));
      for (int d = 0; d < D; ++d) r.dkeys.push_back(out(scale * out(u[d])));
    }
    return r;
  }
};

// Problems whose keys lie in the order of their classes: whole tiles and splits have no negative, or no positive, and
// the keys of one class, the other or both have this bias. fn(setup, level)
template <class Fn>
void sorted_keys(Case c, const std::vector<float>& levels, Fn&& fn) {
  c.labels = kFew;
  c.bias = true;
  int turn = 0;
  for (const float level : levels)
    for (const int biased : {0, 1, 2}) {
      c.positive = turn % 4 == 1;
      c.exclude = turn % 4 == 2;
      ++turn;
      Setup s(c);
      for (int j = 0; j < c.N; ++j) {
        s.key_labels[j] = j >= c.N * 3 / 4;
        s.bias[j] = biased == 2 || s.key_labels[j] == biased ? level : 0.0f;
      }
      fn(s, level);
    }
}

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

void expect_numbers(const char* what, const std::vector<double>& got) {
  for (size_t i = 0; i < got.size(); ++i) expect(!std::isnan(got[i]), "%s %zu is NaN", what, i);
}

}  // namespace softmax_truth
