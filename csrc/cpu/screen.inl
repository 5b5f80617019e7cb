// Exact search through a quicker product: with a bound on what the product can hide, only pairs that may be among the
// best k get their exact score, at the end. With rounded rows q~ and k~, and residuals dq = q - q~, dk = k - k~:
//   |<q, k> - <q~, k~>| <= |dq||k| + |q~||dk| + (2D + 32) 2^-24 |q||k|,
// the last term for the rounding of both sums and of the bound itself. The steps from a product to a score only grow,
// rounding included: the bounds of the product, taken through them, are bounds of the float that is returned.

namespace {

constexpr int kSoon = 12;                       // rows ahead that filling a block fetches
constexpr double kLeast = 1e-12, kMost = 1e12;  // norms between these can neither overflow nor vanish in a product

inline bool extreme(double norm) { return norm != 0 && !(norm > kLeast && norm < kMost); }

// Norms are sums of D rounded squares: made a little larger, they are bounds.
inline float larger(double norm, int64_t dim) {
  return static_cast<float>(norm * (1 + static_cast<double>(dim + 64) * 0x1p-23));
}

// What a block of keys brings to the bounds: product * multiply + high (low) +- (norm, slack) times the query's.
struct KeyBounds {
  static constexpr int kNumbers = 5;            // of a row
  float *multiply, *norm, *slack, *high, *low;  // [NB]

  explicit KeyBounds(float* memory)
      : multiply(memory), norm(memory + NB), slack(memory + 2 * NB), high(memory + 3 * NB), low(memory + 4 * NB) {}

  // Row i: its squared norm, and the squared norm of what rounding took away.
  void set(int i, Metric metric, int64_t dim, double squared, float lost) {
    norm[i] = static_cast<float>(squared);
    slack[i] = lost;
    const Terms k = key_terms(metric, metric == Metric::cosine ? inverse_norm(squared) : norm[i]);
    const float blur = static_cast<float>(dim + 64) * 0x1p-23f * -k.add;  // of the squared norm
    multiply[i] = k.multiply;
    high[i] = k.add + blur;
    low[i] = k.add - blur;
    if (extreme(__builtin_sqrt(squared))) {  // such a key always passes
      multiply[i] = 0;
      high[i] = kInf;
      low[i] = -kInf;
    }
  }

  // Once all n rows are set. `unit` (or null): what one of a row's rounded numbers stands for.
  void finish(int n, int64_t dim, const float* unit) {
    const F more = Simd::set1(larger(1, dim));
    for (int i = 0; i < n; i += W) {
      const F k = Simd::load(multiply + i), factor = Simd::mul(more, k);
      Simd::store(norm + i, Simd::mul(factor, Simd::sqrt(Simd::load(norm + i))));
      Simd::store(slack + i, Simd::mul(factor, Simd::sqrt(Simd::load(slack + i))));
      if (unit) Simd::store(multiply + i, Simd::mul(k, Simd::load(unit + i)));
    }
  }
};

// What a strip of queries brings.
struct QueryBounds {
  float norm[L], slack[L], unit[L];
  LaneTerms terms;

  // A query's norm, and the norm of what rounding took away.
  void set(int lane, int64_t dim, double length, float lost, float one, Terms query) {
    const double sums = (2.0 * static_cast<double>(dim) + 32) * 0x1p-24;
    norm[lane] = larger(length + lost, dim);
    slack[lane] = extreme(length) ? kInf : larger(lost + sums * length, dim);  // infinite: all of its keys pass
    unit[lane] = one;
    terms.multiply[lane] = query.multiply;
    terms.add[lane] = query.add;
  }
};

// Calls offer(row, lane, low, high) for every pair of a strip with the n rows of a block that may score above the
// lane's threshold, with bounds of its score. UNITS: the products [n][L] count the queries' units.
template <bool UNITS, class Offer>
inline void screen_block(const KeyBounds& keys, const float* products, int n, const QueryBounds& queries,
                         const SegmentTerms& segment, const float* threshold, Offer&& offer) {
  F norm[NV], slack[NV], unit[NV], multiply[NV], add[NV];
  for (int v = 0; v < NV; ++v) {
    norm[v] = Simd::load(queries.norm + v * W);
    slack[v] = Simd::load(queries.slack + v * W);
    unit[v] = Simd::load(queries.unit + v * W);
    multiply[v] = Simd::load(queries.terms.multiply + v * W);
    add[v] = Simd::load(queries.terms.add + v * W);
  }
  const auto blur = [&](int i, int v) {
    return Simd::fma(slack[v], Simd::set1(keys.norm[i]), Simd::mul(norm[v], Simd::set1(keys.slack[i])));
  };
  const auto bound = [&](int i, int v, F constant) {
    const F product = Simd::load(products + i * L + v * W), dot = UNITS ? Simd::mul(product, unit[v]) : product;
    return last_steps(Simd::fma(dot, Simd::set1(keys.multiply[i]), constant), multiply[v], add[v], segment);
  };
  const auto highest = [&](int i, int v) { return bound(i, v, Simd::add(blur(i, v), Simd::set1(keys.high[i]))); };
  const auto lowest = [&](int i, int v) {
    return Simd::max(bound(i, v, Simd::sub(Simd::set1(keys.low[i]), blur(i, v))), Simd::set1(-kInf));  // of NaN: -inf
  };
  constexpr int kRows = 16;  // between two looks at the thresholds
  for (int from = 0; from < n; from += kRows) {
    const int to = smaller(from + kRows, n);
    F bar[NV];
    for (int v = 0; v < NV; ++v) bar[v] = Simd::load(threshold + v * W);
    uint32_t passes[kRows];
    for (int i = from; i < to; ++i) {
      uint32_t some = 0;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) some |= Simd::bits(Simd::not_le(highest(i, v), bar[v])) << (v * W);  // NaN passes
      passes[i - from] = some;
    }
    for (int i = from; i < to; ++i) {
      uint32_t some = passes[i - from];
      if (__builtin_expect(some == 0, 1)) continue;
      float low[L], high[L];
      for (int v = 0; v < NV; ++v) {
        Simd::store(low + v * W, lowest(i, v));
        Simd::store(high + v * W, highest(i, v));
      }
      for (; some; some &= some - 1) {
        const int lane = __builtin_ctz(some);
        offer(i, lane, low[lane], high[lane]);
      }
    }
  }
}

// Exact scores of a query (as floats, with its terms) and `n` <= W keys: the additions of score_tile, in its order.
inline void exact_scores(const SearchSegment& s, Metric metric, const float* query, Terms terms, const int32_t* ids,
                         int n, float* out, Workspace& ws) {
  const int64_t dim = s.keys.dim;
  float* lines = ws.floats(kFetched, s.keys.dtype == DType::f32 ? 0 : W * padded(dim));
  const float* rows[W];
  float factor[W] = {};
  for (int i = 0; i < W; ++i) rows[i] = i < n ? floats_of(s.keys, ids[i], lines + i * padded(dim)) : rows[0];
  F dot = Simd::set1(0.0f), squared = Simd::set1(0.0f);
  for (int64_t d = 0; d < dim; d += W) {
    const int width = static_cast<int>(smaller<int64_t>(W, dim - d));
    F key[W];
    const auto add = [&](int j) {
      dot = Simd::fma(Simd::set1(query[d + j]), key[j], dot);
      squared = Simd::fma(key[j], key[j], squared);
    };
    if (width == W) {
      Simd::columns(rows, d, W, key);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) add(j);
    } else {
      Simd::columns(rows, d, width, key);
      for (int j = 0; j < width; ++j) add(j);
    }
  }
  if (metric == Metric::cosine)
    for (int i = 0; i < n; ++i) factor[i] = inverse_norm(squared_norm(rows[i], dim));
  else if (metric == Metric::l2)
    Simd::store(factor, squared);
  float multiply[W], plus[W];
  for (int i = 0; i < W; ++i) {
    const Terms k = key_terms(metric, factor[i]);
    multiply[i] = k.multiply;
    plus[i] = k.add;
  }
  Simd::store(out, finish_score(dot, Simd::load(multiply), Simd::load(plus), Simd::set1(terms.multiply),
                                Simd::set1(terms.add), SegmentTerms(s, metric)));
}

}  // namespace
