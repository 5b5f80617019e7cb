// Exact search through a quicker product: with a bound on what the product can hide, only pairs that may be among the
// best k get their exact score, at the end. With rounded rows q~ and k~, and residuals dq = q - q~, dk = k - k~:
//   |<q, k> - <q~, k~>| <= |dq||k| + |q~||dk| + (2D + 32) 2^-24 |q||k|,
// the last term for the rounding of both sums and of the bound itself. The steps from a product to a score only grow,
// rounding included: the bounds of the product, taken through them, are bounds of the float that is returned.

namespace {

constexpr int kSoon = 12;                       // rows ahead that filling a block fetches
constexpr double kLeast = 1e-12, kMost = 1e12;  // norms between these can neither overflow nor vanish in a product
constexpr float kLargest = 3e38f;               // and finite

inline bool extreme(double squared) { return squared != 0 && !(squared > kLeast * kLeast && squared < kMost * kMost); }

// Norms are sums of D rounded squares: made a little larger, they are bounds.
inline float larger(double norm, int64_t dim) {
  return static_cast<float>(norm * (1 + static_cast<double>(dim + 64) * 0x1p-23));
}

// What rounding can hide of a product with a query of norm and slack 1.
struct Blur {
  float norm, slack;
};

// What a block of keys brings to the bounds: product * multiply + high (low) +- (norm, slack) times the query's.
struct KeyBounds {
  static constexpr int kNumbers = 5;            // of a row
  float *multiply, *norm, *slack, *high, *low;  // [NB]

  explicit KeyBounds(float* memory)
      : multiply(memory), norm(memory + NB), slack(memory + 2 * NB), high(memory + 3 * NB), low(memory + 4 * NB) {}

  KeyBounds from(int row) const { return KeyBounds(multiply + row); }

  // Row i: its squared norm, and the squared norm of what rounding took away.
  void set(int i, Metric metric, int64_t dim, double squared, float lost) {
    norm[i] = static_cast<float>(squared);
    slack[i] = lost;
    const Terms k = key_terms(metric, metric == Metric::cosine ? inverse_norm(squared) : norm[i]);
    const float blur = static_cast<float>(dim + 64) * 0x1p-23f * -k.add;  // of the squared norm
    multiply[i] = k.multiply;
    high[i] = k.add + blur;
    low[i] = k.add - blur;
    if (extreme(squared)) {  // such a key always passes
      multiply[i] = 0;
      high[i] = kInf;
      low[i] = -kInf;
    }
  }

  // The largest of n rows. A key that always passes may have NaN, which is left out.
  Blur most(int n) const {
    Blur most{0, 0};
    for (int i = 0; i < n; ++i) {
      if (norm[i] > most.norm) most.norm = norm[i];
      if (slack[i] > most.slack) most.slack = slack[i];
    }
    return most;
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
  float norm[L], slack[L], unit[L], inverse[L];  // the last: of what its terms multiply by
  LaneTerms terms;

  // A query's norm, and the norm of what rounding took away.
  void set(int lane, int64_t dim, double length, float lost, float one, Terms query) {
    const double sums = (2.0 * static_cast<double>(dim) + 32) * 0x1p-24;
    norm[lane] = larger(length + lost, dim);
    slack[lane] =
        extreme(length * length) ? kInf : larger(lost + sums * length, dim);  // infinite: all of its keys pass
    unit[lane] = one;
    terms.multiply[lane] = query.multiply;
    terms.add[lane] = query.add;
    inverse[lane] = 1 / query.multiply;
  }
};

// A limit for products after the key's steps: up to it no score is above the lane's bar. The bar taken through the
// other steps backwards, which round, and a little less; where taking it forwards does not confirm it, -inf. Steps only
// grow.
inline F inner_limit(F bar, F multiply, F add, F inverse, const SegmentTerms& s) {
  const auto size = [](F a) { return Simd::max(a, Simd::sub(Simd::set1(0.0f), a)); };
  const F rounding =
      Simd::mul(Simd::fma(Simd::add(size(bar), size(s.offset)), s.inverse_scale, size(add)), Simd::set1(0x1p-21f));
  const F scaled = Simd::sub(Simd::mul(Simd::sub(bar, s.offset), s.inverse_scale), add);
  const F limit = Simd::min(Simd::mul(Simd::sub(scaled, rounding), inverse), Simd::set1(kLargest));  // of NaN: kLargest
  const F finite = Simd::max(limit, Simd::set1(-kLargest));
  return Simd::select(Simd::not_le(last_steps(finite, multiply, add, s), bar), Simd::set1(-kInf), finite);
}

// Calls offer(row, lane, low, high) for every pair of a strip with the n rows of a block that may score above the
// lane's threshold, with bounds of its score. UNITS: the products [n][L] count the queries' units. `most`: the rows'.
template <bool UNITS, class Offer>
inline void screen_block(const KeyBounds& keys, const Blur& most, const float* products, int n,
                         const QueryBounds& queries, const SegmentTerms& segment, const float* threshold,
                         Offer&& offer) {
  F norm[NV], slack[NV], unit[NV], multiply[NV], add[NV], largest_blur[NV], limit[NV];
  const auto blur = [&](float key_norm, float key_slack, int v) {
    return Simd::fma(slack[v], Simd::set1(key_norm), Simd::mul(norm[v], Simd::set1(key_slack)));
  };
  for (int v = 0; v < NV; ++v) {
    norm[v] = Simd::load(queries.norm + v * W);
    slack[v] = Simd::load(queries.slack + v * W);
    unit[v] = Simd::load(queries.unit + v * W);
    multiply[v] = Simd::load(queries.terms.multiply + v * W);
    add[v] = Simd::load(queries.terms.add + v * W);
    largest_blur[v] = blur(most.norm, most.slack, v);
    limit[v] =
        inner_limit(Simd::load(threshold + v * W), multiply[v], add[v], Simd::load(queries.inverse + v * W), segment);
  }
  const auto inner = [&](int i, int v, F constant) {
    const F product = Simd::load(products + i * L + v * W), dot = UNITS ? Simd::mul(product, unit[v]) : product;
    return Simd::fma(dot, Simd::set1(keys.multiply[i]), constant);
  };
  constexpr int kRows = 64;
  for (int from = 0; from < n; from += kRows) {
    // Which rows may pass: the largest blur of the block instead of each row's, and no step after the key's.
    uint64_t rows = 0;
    for (int i = from; i < smaller(from + kRows, n); ++i) {
      const F high = Simd::set1(keys.high[i]);
      bool some = false;
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        some |= Simd::bits(Simd::not_le(inner(i, v, Simd::add(largest_blur[v], high)), limit[v])) != 0;  // NaN passes
      rows |= static_cast<uint64_t>(some) << (i - from);
    }
    for (; rows; rows &= rows - 1) {
      const int i = from + __builtin_ctzll(rows);
      float low[L], high[L];
      uint32_t passes = 0;
      for (int v = 0; v < NV; ++v) {
        const F around = blur(keys.norm[i], keys.slack[i], v);
        const auto bound = [&](F constant) { return last_steps(inner(i, v, constant), multiply[v], add[v], segment); };
        const F highest = bound(Simd::add(around, Simd::set1(keys.high[i])));
        const F lowest = bound(Simd::sub(Simd::set1(keys.low[i]), around));
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

// Exact scores of a query (as floats, with its terms) and `n` <= W keys: the additions of score_tile, in its order.
inline void exact_scores(const SearchSegment& s, Metric metric, const float* query, Terms terms, const int32_t* ids,
                         int n, float* out, Workspace& ws) {
  const int64_t dim = s.keys.dim;
  float* lines = ws.floats(kFetched, s.keys.dtype == DType::f32 ? 0 : W * padded(dim));
  const float* rows[W];
  float factor[W] = {};
  for (int i = 0; i < W; ++i) rows[i] = i < n ? floats_of(s.keys, ids[i], lines + i * padded(dim)) : rows[0];
  static_assert(PIECE % W == 0, "a piece is whole vectors");
  const F zero = Simd::set1(0.0f);
  F dots = zero, squares = zero, dot = zero, squared = zero;  // of the pieces before, and of this one
  const auto join = [&](bool others) {
    dots = others ? Simd::add(dots, dot) : dot;
    squares = others ? Simd::add(squares, squared) : squared;
    dot = squared = zero;
  };
  for (int64_t d = 0; d < dim; d += W) {
    if (d && d % PIECE == 0) join(d > PIECE);
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
  join(dim > PIECE);
  if (metric == Metric::cosine)
    for (int i = 0; i < n; ++i) factor[i] = inverse_norm(squared_norm(rows[i], dim));
  else if (metric == Metric::l2)
    Simd::store(factor, squares);
  float multiply[W], plus[W];
  for (int i = 0; i < W; ++i) {
    const Terms k = key_terms(metric, factor[i]);
    multiply[i] = k.multiply;
    plus[i] = k.add;
  }
  Simd::store(out, finish_score(dots, Simd::load(multiply), Simd::load(plus), Simd::set1(terms.multiply),
                                Simd::set1(terms.add), SegmentTerms(s, metric)));
}

}  // namespace
