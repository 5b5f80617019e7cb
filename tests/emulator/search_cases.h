// Search problems and their truth on the host: float64, and the float that every pair is documented to get.
#pragma once
#include <algorithm>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>

#include "device_test.h"
#include "engine.h"

namespace search_cases {

using namespace fastcompat;
using device_test::Buffer;

constexpr double INF = std::numeric_limits<double>::infinity();

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, float>) return DType::f32;
  return std::is_same_v<T, cuda::bf16> ? DType::bf16 : DType::f16;
}

// Rows on the host, widened, and on the device with `padding` elements of NaN behind each row and `shift` before all.
struct Rows {
  int64_t rows, dim;
  std::vector<float> values;  // [rows, dim]
  std::shared_ptr<void> memory;
  Matrix matrix;

  template <class T>
  static Rows of(std::vector<float> values, int64_t rows, int64_t dim, int64_t padding = 0, int64_t shift = 0) {
    const int64_t stride = dim + padding;
    std::vector<T> laid(static_cast<size_t>(shift + rows * stride), T(NAN));
    for (int64_t i = 0; i < rows * dim; ++i) {
      const T rounded(values[i]);
      values[i] = static_cast<float>(rounded);
      laid[shift + i / dim * stride + i % dim] = rounded;
    }
    auto buffer = std::make_shared<Buffer<T>>(laid);
    return {rows, dim, values, buffer, {buffer->data() + shift, dtype_of<T>(), rows, dim, stride}};
  }
  const float* row(int64_t i) const { return values.data() + i * dim; }
};

inline double dot64(const float* a, const float* b, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * b[d];
  return sum;
}

// Lane l of 32 adds elements 8l .. 8l + 7 of every 256; then lanes that differ in bit 4, 3, 2, 1, 0 are added.
template <class Term>
float sum32(int64_t dim, Term term) {
  float lanes[32] = {}, next[32];
  for (int l = 0; l < 32; ++l)
    for (int64_t first = 8 * l; first < dim; first += 256)
      for (int64_t d = first; d < std::min(first + 8, dim); ++d) lanes[l] = term(d, lanes[l]);
  for (int bit = 16; bit; bit /= 2) {
    for (int l = 0; l < 32; ++l) next[l] = lanes[l] + lanes[l ^ bit];
    std::copy(next, next + 32, lanes);
  }
  return lanes[0];
}

inline double score64(const float* q, const float* k, int64_t dim, Metric metric) {
  const double dot = dot64(q, k, dim), qq = dot64(q, q, dim), kk = dot64(k, k, dim);
  if (metric == Metric::ip) return dot;
  if (metric == Metric::cosine) return qq > 0 && kk > 0 ? dot / std::sqrt(qq) / std::sqrt(kk) : 0;
  double square = 0;
  for (int64_t d = 0; d < dim; ++d) square += (static_cast<double>(q[d]) - k[d]) * (static_cast<double>(q[d]) - k[d]);
  return -square;
}

// What rounding may do to a score: of the terms of its sum (in any order), of norms, of the last operations.
inline double allowed_error(const float* q, const float* k, int64_t dim, Metric metric) {
  const double qq = dot64(q, q, dim), kk = dot64(k, k, dim), unit = std::ldexp(static_cast<double>(dim) + 8, -23);
  if (metric == Metric::cosine) return unit;
  return unit * (metric == Metric::ip ? std::sqrt(qq * kk) : -score64(q, k, dim, metric)) + 1e-44;
}

// The power of two that a row is multiplied by, and what the sum is multiplied by then.
inline std::pair<float, float> factors32(const float* x, int64_t dim, Metric metric) {
  const float square = sum32(dim, [&](int64_t d, float sum) { return std::fmaf(x[d], x[d], sum); });
  const double wide = square > 1e-30f && square < 1e37f ? square : dot64(x, x, dim);
  float lift = 1;
  if (wide > 0 && (wide < 1e-24 || wide > 1e24)) {
    const int norm = static_cast<int>(std::floor(std::ilogb(wide) / 2.0));
    lift = std::ldexp(1.0f, metric == Metric::ip ? std::clamp(norm / 2, -38, 38) - norm : std::clamp(-norm, -120, 120));
  }
  if (metric == Metric::ip) return {lift, 1 / lift};
  const double norm = std::sqrt(wide) * lift;
  return {lift, norm > 0 ? static_cast<float>(1 / norm) : 0.0f};
}

inline float score32(const float* q, const float* k, int64_t dim, Metric metric, float scale = 1, float offset = 0) {
  if (metric == Metric::l2) {
    const float square = sum32(dim, [&](int64_t d, float sum) { return std::fmaf(q[d] - k[d], q[d] - k[d], sum); });
    return std::fmaf(-square, scale, offset) + 0.0f;
  }
  const auto [lift_q, multiply_q] = factors32(q, dim, metric);
  const auto [lift_k, multiply_k] = factors32(k, dim, metric);
  const float lq = lift_q, lk = lift_k;
  const float dot = sum32(dim, [&](int64_t d, float sum) { return std::fmaf(q[d] * lq, k[d] * lk, sum); });
  return std::fmaf(dot * multiply_k * multiply_q, scale, offset) + 0.0f;
}

struct Part {
  Rows query, keys;
  std::vector<int64_t> listed;  // empty and `all`: every row
  bool all = true;
  float scale = 1, offset = 0;
  std::shared_ptr<Buffer<int64_t>> listed_memory = nullptr;
  std::vector<int32_t> items = {};  // empty: an item's number is its row
  std::shared_ptr<Buffer<int32_t>> items_memory = nullptr;

  int64_t count() const { return all ? keys.rows : static_cast<int64_t>(listed.size()); }
  int64_t row(int64_t position) const { return all ? position : listed[position]; }
  Segment segment() {
    if (!all) listed_memory = std::make_shared<Buffer<int64_t>>(listed);
    if (!items.empty()) items_memory = std::make_shared<Buffer<int32_t>>(items);
    Segment segment = {query.matrix, keys.matrix, all ? nullptr : listed_memory->data(), count(), scale, offset};
    segment.items = items.empty() ? nullptr : items_memory->data();
    return segment;
  }
};

// Ids and scores in the order of the documentation: score down, then id up; -inf and NaN are no candidates.
using Ranked = std::vector<std::pair<float, int64_t>>;
inline void sort_ranked(Ranked& all) {
  std::sort(all.begin(), all.end(),
            [](auto& a, auto& b) { return std::tuple(-a.first, a.second) < std::tuple(-b.first, b.second); });
}

// ---- ways to make rows hard to rank

inline std::vector<float> gauss(int64_t rows, int64_t dim, unsigned seed, float sigma = 1) {
  return device_test::normal<float>(static_cast<size_t>(rows * dim), seed, sigma);
}
// All but equal: one row, each element off by a few units in the last place.
inline std::vector<float> near_ties(int64_t rows, int64_t dim, unsigned seed, float relative) {
  const auto base = gauss(1, dim, seed), noise = gauss(rows, dim, seed + 1, relative);
  std::vector<float> out(static_cast<size_t>(rows * dim));
  for (int64_t i = 0; i < rows * dim; ++i) out[i] = base[i % dim] * (1 + noise[i]);
  return out;
}
// Around a point far from the origin: squared norms cancel in a distance.
inline std::vector<float> far_away(int64_t rows, int64_t dim, unsigned seed, float mean) {
  auto out = gauss(rows, dim, seed);
  for (float& x : out) x += mean;
  return out;
}
// Few different rows, each many times.
inline std::vector<float> duplicates(int64_t rows, int64_t dim, unsigned seed, int64_t different) {
  const auto base = gauss(different, dim, seed);
  std::vector<float> out(static_cast<size_t>(rows * dim));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < dim; ++d) out[i * dim + d] = base[(i * 7 % different) * dim + d];
  return out;
}
// Norms from 10^-decades to 10^decades, and a zero row here and there.
inline std::vector<float> mixed_norms(int64_t rows, int64_t dim, unsigned seed, double decades) {
  auto out = gauss(rows, dim, seed);
  for (int64_t i = 0; i < rows; ++i) {
    const float factor = i % 13 == 5 ? 0.0f : static_cast<float>(std::pow(10, decades * std::sin(1.7 * i + seed)));
    for (int64_t d = 0; d < dim; ++d) out[i * dim + d] *= factor;
  }
  return out;
}

}  // namespace search_cases
