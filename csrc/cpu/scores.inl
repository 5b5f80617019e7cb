// Search: top-k and beat-counts over the same tiles of scores. Floor: 2*B*N*D operations at the FMA peak (l2: 3*B*N*D).
// Fused: the metric, segments, thresholds. Labels and exclusions are looked at for survivors only.
// score = scale * sum * a_row * c_lane + offset:
//   cosine: sum = <q, k>, a = 1/|k|, c = 1/|q|;   ip: sum = <q, k>, a = c = 1;   l2: sum = sum (q - k)^2, a = -1, c
//   = 1.
// One score, one arithmetic: score_tile and exact_scores add up a pair's terms in one order. l2 is never taken from
// |q|^2 + |k|^2 - 2<q, k>, which loses the distance of vectors that are long and near each other.
// Rows of extreme norms, whose products no float holds, are multiplied by a power of two first (lift_of): exactly.
#pragma once
#include "metric.h"
#include "tile.inl"

namespace {

// Squared differences instead of products.
struct Difference {
  static constexpr int PACK = 1, STEP = 1;
  static F step(F acc, const float* a, F b) { return step(acc, Simd::set1(*a), b); }
  static F step(F acc, F a, F b) {
    const F t = Simd::sub(b, a);
    return Simd::fma(t, t, acc);
  }
};
template <class A>
constexpr bool kDifferences = false;
template <>
constexpr bool kDifferences<Difference> = true;

// Calls fn(A{}) with the arithmetic of scores for this matrix. Processors with AMX multiply fp32 faster than bf16.
template <class Fn>
inline auto with_search_arithmetic([[maybe_unused]] const Matrix& m, Metric metric, Fn&& fn) {
  if (form_of(metric).differences) return fn(Difference{});
#if defined(FASTCOMPAT_BF16) && !defined(FASTCOMPAT_AMX)
  if (m.dtype == DType::bf16) return fn(Bf16{});
#endif
  return fn(Fp32{});
}

// A squared norm that float arithmetic can be trusted with: it did not overflow, and squares that underflow (below
// 2^-126, about 1e-38 each) are nothing beside it.
inline bool ordinary(float squared) { return squared > 1e-30f && squared < 1e37f; }

// Squared norm of a row, +inf or NaN when the row is not finite. In double where float could overflow or underflow.
inline double squared_norm(const float* row, int64_t dim) {
  F acc[4] = {Simd::set1(0.0f), Simd::set1(0.0f), Simd::set1(0.0f), Simd::set1(0.0f)};
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W)
    for (int v = 0; v < 4; ++v) {
      const F a = Simd::load(row + d + v * W);
      acc[v] = Simd::fma(a, a, acc[v]);
    }
  float sum = Simd::sum(Simd::add(Simd::add(acc[0], acc[1]), Simd::add(acc[2], acc[3])));
  for (; d < dim; ++d) sum += row[d] * row[d];
  if (ordinary(sum)) return sum;
  double exact = 0;
  for (d = 0; d < dim; ++d) exact += static_cast<double>(row[d]) * row[d];
  return exact;
}

inline bool is_finite(double squared) { return squared < __builtin_inf(); }

constexpr double kLeast = 1e-12, kMost = 1e12;  // norms between these can neither overflow nor vanish in a product

inline bool extreme(double squared) { return squared != 0 && !(squared > kLeast * kLeast && squared < kMost * kMost); }

// The power of two that makes an extreme norm ordinary: near 1 with cosine, towards its square root with ip, so that
// neither the sum nor what undoes this, a row at a time, passes the range of floats where the score does not. The
// exponent of a double is 11 bits from bit 52 on, biased by 1023; half of it is the norm's. A lift of
// 2^120 or 2^-120 and its inverse are ordinary floats; a norm of 2^38 or 2^-38 is no longer extreme.
inline float lift_of(Metric metric, double squared) {
  if (!extreme(squared) || !is_finite(squared)) return 1;
  uint64_t bits;
  std::memcpy(&bits, &squared, sizeof bits);
  const int norm = (static_cast<int>(bits >> 52) - 1023) >> 1;
  const auto within = [](int x, int limit) { return x < -limit ? -limit : x > limit ? limit : x; };
  const int up = form_of(metric).normalised ? within(-norm, 120) : within(norm / 2, 38) - norm;
  return float_from_bits(static_cast<uint32_t>(up + 127) << 23);
}

// What a row contributes to its scores: the row is multiplied by `lift` first, the sum by `multiply`.
struct RowFactor {
  float lift, multiply;

  RowFactor(Metric metric, double squared, bool key) : lift(1), multiply(key ? -1.0f : 1.0f) {
    const MetricForm form = form_of(metric);
    if (form.differences) return;
    lift = lift_of(metric, squared);
    multiply = 1 / lift;
    if (!form.normalised) return;
    const double lifted = squared * (static_cast<double>(lift) * lift);
    multiply = lifted > 0 ? static_cast<float>(1 / __builtin_sqrt(lifted)) : 0.0f;
  }
};

// Multiplies words of a row: one float, or two bf16.
template <class A>
inline void lift_words(float* words, int64_t n, float lift) {
  if constexpr (A::PACK == 1) {
    for (int64_t w = 0; w < n; ++w) words[w] *= lift;
  } else {
    for (int64_t w = 0; w < n; ++w) {
      const uint32_t two = bits_of_float(words[w]);
      const uint16_t low = float_to_bf16(lift * bf16_to_float(static_cast<uint16_t>(two)));
      const uint16_t high = float_to_bf16(lift * bf16_to_float(static_cast<uint16_t>(two >> 16)));
      words[w] = float_from_bits(static_cast<uint32_t>(high) << 16 | low);
    }
  }
}

inline bool all_finite(const Matrix& m, int64_t row) {
  bool finite = true;
  for (int64_t d = 0; d < m.dim; ++d) {
    float x;
    to_floats(&x, m, row, d, 1);
    finite &= x - x == 0;
  }
  return finite;
}

int64_t factors(const RowRange& r, Metric metric, float* multiply, float* lift, Workspace& ws) {
  float* line = ws.floats(kRow, r.matrix.dim);
  int64_t bad = -1;
  for (int64_t i = 0; i < r.count; ++i) {
    const double squared = squared_norm(floats_of(r.matrix, r.row(i), line), r.matrix.dim);
    if (!is_finite(squared) && (bad < 0 || r.row(i) < r.row(bad))) bad = i;
    const RowFactor factor(metric, squared, false);
    multiply[i] = factor.multiply;
    lift[i] = factor.lift;
  }
  return bad;
}

// Keeps the smallest row that is not finite, of all items.
inline void note_bad(int64_t* bad, int64_t row) {
  int64_t seen = __atomic_load_n(bad, __ATOMIC_RELAXED);
  while (row < seen && !__atomic_compare_exchange_n(bad, &seen, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// What a segment does to every score.
struct SegmentTerms {
  F scale, offset, inverse_scale;

  explicit SegmentTerms(const SearchSegment& s)
      : scale(Simd::set1(s.scale)), offset(Simd::set1(s.offset)), inverse_scale(Simd::set1(1 / s.scale)) {}
};

inline F finish_score(F sum, F a, F c, const SegmentTerms& s) {
  return Simd::fma(Simd::mul(Simd::mul(sum, a), c), s.scale, s.offset);
}

// A block of queries, packed for one segment.
template <class A>
struct PackedQueries {
  int strips;
  int64_t words;
  float *panels, *multiply;  // [strips][words][L], [strips][L]

  PackedQueries(const SearchSegment& s, int64_t first, int64_t count, Workspace& ws)
      : strips(static_cast<int>((count + L - 1) / L)), words(words_of<A>(s.query.dim)) {
    panels = ws.floats(kPanels, strips * words * L);
    multiply = ws.floats(kQueryFactors, strips * L);
    const RowRange range{s.query, nullptr, first, count};
    for (int t = 0; t < strips; ++t) {
      const int n = static_cast<int>(smaller<int64_t>(count - t * L, L));
      pack_lanes<A>(range, t * L, n, panels + t * words * L, ws);
      for (int lane = 0; lane < L; ++lane)
        multiply[t * L + lane] = lane < n ? s.query_factor[first + t * L + lane] : 0.0f;
    }
  }
  const float* panel(int t) const { return panels + t * words * L; }
};

// A packed block of keys, lifted, with their factors.
template <class A>
struct PackedKeys {
  float multiply[NB];

  PackedKeys(const RowRange& keys, Metric metric, int64_t first, int n, float* block, int64_t* bad, Workspace& ws) {
    pack_rows<A>(keys, first, n, block);
    const int64_t dim = keys.matrix.dim, words = words_of<A>(dim);
    float* line = ws.floats(kRow, dim);
    for (int i = 0; i < n; ++i) {
      const int64_t row = keys.row(first + i);
      const double squared = squared_norm(floats_of(keys.matrix, row, line), dim);
      if (!is_finite(squared)) note_bad(bad, row);
      const RowFactor factor(metric, squared, true);
      multiply[i] = factor.multiply;
      for (int64_t c = 0; factor.lift != 1 && c * CHUNK < words; ++c)
        lift_words<A>(block + (c * NB + i) * CHUNK, smaller<int64_t>(words - c * CHUNK, CHUNK), factor.lift);
    }
  }
};

// Finished scores of R rows with a strip of queries.
template <class A, int R>
inline __attribute__((always_inline)) void finished_tile(const SegmentTerms& s, const float* block, int first,
                                                         const PackedQueries<A>& queries, int t,
                                                         const PackedKeys<A>& keys, F (&acc)[R][NV]) {
  score_tile<A, R>(block, first, queries.panel(t), queries.words, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const F a = Simd::set1(keys.multiply[first + r]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      acc[r][v] = finish_score(acc[r][v], a, Simd::load(queries.multiply + t * L + v * W), s);
  }
}

// Exact scores of a query (its words, and what it multiplies by) and `n` <= W keys: the sums of score_tile, in its
// order.
template <class A>
inline void exact_scores(const SearchSegment& s, Metric metric, const float* query, float factor, const int32_t* ids,
                         int n, float* out, Workspace& ws) {
  const int64_t dim = s.keys.dim, words = words_of<A>(dim), stride = padded(dim);
  float* lines = ws.floats(kGathered, (W + 1) * stride);
  const float* rows[W];
  float multiply[W] = {};
  for (int i = 0; i < n; ++i) {
    float* line = lines + i * stride;
    rows[i] = words_of_row<A>(s.keys, ids[i], line);
    const bool norm = !form_of(metric).differences;
    const double squared = norm ? squared_norm(floats_of(s.keys, ids[i], lines + W * stride), dim) : 1.0;
    const RowFactor key(metric, squared, true);
    multiply[i] = key.multiply;
    if (key.lift != 1) {
      std::memmove(line, rows[i], static_cast<size_t>(words) * sizeof(float));
      lift_words<A>(line, words, key.lift);
      rows[i] = line;
    }
  }
  for (int i = n; i < W; ++i) rows[i] = rows[0];
  static_assert(PIECE % W == 0, "a piece is whole vectors");
  F total = Simd::set1(0.0f), sum = total;
  for (int64_t w = 0; w < words; w += W) {
    if (w && w % PIECE == 0) {
      total = w > PIECE ? Simd::add(total, sum) : sum;
      sum = Simd::set1(0.0f);
    }
    const int width = static_cast<int>(smaller<int64_t>(W, words - w));
    F key[W];
    if (width == W) {
      Simd::columns(rows, w, W, key);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) sum = A::step(sum, key[j], Simd::set1(query[w + j]));
    } else {
      Simd::columns(rows, w, width, key);
      for (int j = 0; j < width; ++j) sum = A::step(sum, key[j], Simd::set1(query[w + j]));
    }
  }
  if (words > PIECE) sum = Simd::add(total, sum);
  Simd::store(out, finish_score(sum, Simd::load(multiply), Simd::set1(factor), SegmentTerms(s)));
}

inline int32_t id_at(const SearchSegment& s, int64_t position) {
  return static_cast<int32_t>(s.rows ? s.rows[position] : position);
}

// The next smaller float: one less in its bits above 0, one more below; -inf and NaN stay what they are.
inline float just_below(float x) {
  uint32_t u = bits_of_float(x);
  if (x != x || u == 0xff800000u) return x;                // NaN, -inf
  if ((u << 1) == 0) return float_from_bits(0x80000001u);  // of both zeros: the smallest subnormal, negative
  return float_from_bits(u >> 31 ? u + 1 : u - 1);
}

}  // namespace
