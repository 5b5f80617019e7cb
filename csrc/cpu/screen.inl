// Exact search through a quicker product: with a bound on what the product can hide, only pairs that may be among the
// best k get their exact score, at the end. With rounded rows q~ and k~, and residuals dq = q - q~, dk = k - k~:
//   |<q, k> - <q~, k~>| <= |dq||k| + |q~||dk| + (2D + 32) 2^-24 |q||k|,
// the last term for the rounding of both sums and of the bound itself. The steps from a product to a score only grow,
// rounding included: the bounds of the product, taken through them, are bounds of the float that is returned.
// l2 is screened as 2<q, k> - |k|^2 - |q|^2 of rows from which a common centre was subtracted: a distance does not
// change, and little cancels. What does is in the bound: (D + 64) 2^-22 of both squared norms, for the rounding of the
// norms, of the steps, of the subtraction (2^-24 of a number) and of the exact score, which is at most 2(|q|^2 +
// |k|^2).
#pragma once
#include "scores.inl"

namespace {

constexpr int kPrefetchRows = 12;  // rows ahead that filling a block fetches
constexpr float kLargest = 3e38f;  // finite, for +inf: no inf - inf

// Norms are sums of D rounded squares: made a little larger, they are bounds.
inline float larger(double norm, int64_t dim) {
  return static_cast<float>(norm * (1 + static_cast<double>(dim + 64) * 0x1p-23));
}

// What l2 loses with a squared norm.
inline float square_error(float square, int64_t dim) { return static_cast<float>(dim + 64) * 0x1p-22f * square; }

// What rounding can hide of a product with a query of norm and residual 1.
struct ErrorFactors {
  float norm, residual;
};

// What a block of keys contributes to the bounds: product * multiply + high (low) +- (norm, residual) times the
// query's.
struct KeyBounds {
  static constexpr int kNumbers = 5;               // of a row
  float *multiply, *norm, *residual, *high, *low;  // [NB]

  explicit KeyBounds(float* memory)
      : multiply(memory), norm(memory + NB), residual(memory + 2 * NB), high(memory + 3 * NB), low(memory + 4 * NB) {}

  KeyBounds from(int row) const { return KeyBounds(multiply + row); }

  // Row i, as it is screened: its squared norm, the squared norm of what rounding took away, and what its products are
  // multiplied by (l2: not used).
  void set(int i, Metric metric, int64_t dim, double squared, float residual_squared, float factor) {
    const bool l2 = form_of(metric).differences;
    const float square = static_cast<float>(squared), error = l2 ? square_error(square, dim) : 0;
    norm[i] = square;
    residual[i] = residual_squared;
    multiply[i] = l2 ? 2 : factor;
    high[i] = l2 ? error - square : 0;
    low[i] = l2 ? -error - square : 0;
    if (extreme(squared)) {  // such a key always passes
      multiply[i] = 0;
      high[i] = kInf;
      low[i] = -kInf;
    }
  }

  // The largest of n rows. A key that always passes may have NaN, which is left out.
  ErrorFactors most(int n) const {
    ErrorFactors most{0, 0};
    for (int i = 0; i < n; ++i) {
      if (norm[i] > most.norm) most.norm = norm[i];
      if (residual[i] > most.residual) most.residual = residual[i];
    }
    return most;
  }

  // Once all n rows are set. `unit` (or null): what one of a row's rounded numbers stands for.
  void finish(int n, int64_t dim, const float* unit) {
    const F more = Simd::set1(larger(1, dim));
    for (int i = 0; i < n; i += W) {
      const F k = Simd::load(multiply + i), factor = Simd::mul(more, k);
      Simd::store(norm + i, Simd::mul(factor, Simd::sqrt(Simd::load(norm + i))));
      Simd::store(residual + i, Simd::mul(factor, Simd::sqrt(Simd::load(residual + i))));
      if (unit) Simd::store(multiply + i, Simd::mul(k, Simd::load(unit + i)));
    }
  }
};

struct LaneTerms {  // of inner * multiply + add
  float multiply[L], add[L];
};

// What a strip of queries contributes.
struct QueryBounds {
  float norm[L], residual[L], own_error[L], unit[L],
      inverse[L];  // `own_error`: whatever the key; the last: of what terms multiply by
  LaneTerms terms;
  float sum_ratio;  // the largest that a sum can be instead of 1

  // A query's norm, the norm of what rounding took away, and what its products are multiplied by.
  void set(int lane, Metric metric, int64_t dim, double length, float residual_norm, float one, float factor) {
    const double sums = (2.0 * static_cast<double>(dim) + 32) * 0x1p-24;
    const float square = form_of(metric).differences ? static_cast<float>(length * length) : 0;
    norm[lane] = larger(length + residual_norm, dim);
    residual[lane] =
        extreme(length * length) ? kInf : larger(residual_norm + sums * length, dim);  // infinite: all of its keys pass
    own_error[lane] = square_error(square, dim);
    unit[lane] = one;
    terms.multiply[lane] = factor;
    terms.add[lane] = -square;
    inverse[lane] = 1 / factor;
    sum_ratio = 1;
  }
};

inline F last_steps(F inner, F c, F d, const SegmentTerms& s) {
  return Simd::fma(Simd::fma(inner, c, d), s.scale, s.offset);
}

// A limit for products after the key's steps: up to it no score is above the lane's threshold. The threshold taken
// through the other steps backwards, and less by 2^-21 of every term, eight times what one rounding can take; where
// taking it forwards does not confirm it, -inf. Steps only grow.
inline F inner_limit(F threshold, F multiply, F add, F inverse, const SegmentTerms& s) {
  const auto size = [](F a) { return Simd::max(a, Simd::sub(Simd::set1(0.0f), a)); };
  const F rounding = Simd::mul(Simd::fma(Simd::add(size(threshold), size(s.offset)), s.inverse_scale, size(add)),
                               Simd::set1(0x1p-21f));
  const F scaled = Simd::sub(Simd::mul(Simd::sub(threshold, s.offset), s.inverse_scale), add);
  const F limit = Simd::min(Simd::mul(Simd::sub(scaled, rounding), inverse), Simd::set1(kLargest));  // of NaN: kLargest
  const F finite = Simd::max(limit, Simd::set1(-kLargest));
  return Simd::select(Simd::not_le(last_steps(finite, multiply, add, s), threshold), Simd::set1(-kInf), finite);
}

// Calls offer(row, lane, low, high) for every pair of a strip with the n rows of a block that may score above the
// lane's threshold, with bounds of its score. UNITS: the products [n][L] count the queries' units. `most`: the rows'.
template <bool UNITS, class Offer>
inline void screen_block(const KeyBounds& keys, const ErrorFactors& most, const float* products, int n,
                         const QueryBounds& queries, const SegmentTerms& segment, const float* threshold,
                         Offer&& offer) {
  F norm[NV], residual[NV], own_error[NV], unit[NV], multiply[NV], add[NV], largest_error[NV], limit[NV];
  const F sum_ratio = Simd::set1(queries.sum_ratio);
  const auto error_bound = [&](float key_norm, float key_residual, int v) {
    return Simd::fma(residual[v], Simd::set1(key_norm), Simd::fma(norm[v], Simd::set1(key_residual), own_error[v]));
  };
  for (int v = 0; v < NV; ++v) {
    norm[v] = Simd::load(queries.norm + v * W);
    residual[v] = Simd::load(queries.residual + v * W);
    own_error[v] = Simd::load(queries.own_error + v * W);
    unit[v] = Simd::load(queries.unit + v * W);
    multiply[v] = Simd::load(queries.terms.multiply + v * W);
    add[v] = Simd::load(queries.terms.add + v * W);
    largest_error[v] = error_bound(most.norm, most.residual, v);
    limit[v] =
        inner_limit(Simd::load(threshold + v * W), multiply[v], add[v], Simd::load(queries.inverse + v * W), segment);
  }
  const auto product = [&](int i, int v) {
    const F p = Simd::load(products + i * L + v * W);
    return UNITS ? Simd::mul(p, unit[v]) : p;
  };
  const auto inner = [&](F dot, int i, F constant) { return Simd::fma(dot, Simd::set1(keys.multiply[i]), constant); };
  constexpr int kRows = 64;  // as many as `rows` has bits
  for (int from = 0; from < n; from += kRows) {
    // Which rows may pass: the largest error of the block instead of each row's, and no step after the key's.
    uint64_t rows = 0;
    for (int i = from; i < smaller(from + kRows, n); ++i) {
      const F high = Simd::set1(keys.high[i]);
      bool some = false;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        some |= Simd::bits(Simd::not_le(inner(product(i, v), i, Simd::add(largest_error[v], high)), limit[v])) !=
                0;  // NaN passes
      rows |= static_cast<uint64_t>(some) << (i - from);
    }
    for (; rows; rows &= rows - 1) {
      const int i = from + __builtin_ctzll(rows);
      float low[L], high[L];
      uint32_t passes = 0;
      for (int v = 0; v < NV; ++v) {
        const F error = error_bound(keys.norm[i], keys.residual[i], v), dot = product(i, v);
        const auto bound = [&](F dot, F constant) {
          return last_steps(inner(dot, i, constant), multiply[v], add[v], segment);
        };
        const F highest = bound(dot, Simd::add(error, Simd::set1(keys.high[i])));
        const F lowest = bound(Simd::mul(dot, sum_ratio), Simd::sub(Simd::set1(keys.low[i]), error));
        Simd::store(high + v * W, highest);
        Simd::store(low + v * W, Simd::max(lowest, Simd::set1(-kInf)));  // of NaN: -inf
        passes |= Simd::bits(Simd::not_le(highest, Simd::load(threshold + v * W))) << (v * W);
      }
      for (; passes; passes &= passes - 1) {
        const int lane = __builtin_ctz(passes);
        offer(i, lane, low[lane], high[lane]);
      }
    }
  }
}

}  // namespace
