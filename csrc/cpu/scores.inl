// Search: top-k and beat-counts over the same tiles of scores. Floor: 2*B*N*D operations at the FMA peak.
// Fused: the metric, segments, thresholds. Labels and exclusions are looked at for survivors only.
// score = scale * ((dot * a_row + b_row) * c_lane + d_lane) + offset:
//   cosine: a = 1/|k|, c = 1/|q|;   ip: a = c = 1;   l2: a = 2, b = -|k|^2, d = -|q|^2.

namespace {

// Calls fn(A{}) with the arithmetic of scores for this matrix. Processors with AMX multiply fp32 faster than bf16
// pairs.
template <class Fn>
inline auto with_search_arithmetic(const Matrix& m, Fn&& fn) {
#if defined(FASTCOMPAT_BF16) && !defined(FASTCOMPAT_AMX)
  if (m.dtype == DType::bf16) return fn(Bf16{});
#endif
  (void)m;
  return fn(Fp32{});
}

// Squared norms of the rows packed in a panel, by the arithmetic of the scores: a row's distance to its duplicate is 0.
template <class A>
void squared_norms(const float* panel, int64_t words, float* out) {
  for (int v = 0; v < NV; ++v) {
    const auto step = [&](int64_t w, F sum) {
      const F a = Simd::load(panel + w * L + v * W);
      return A::step(sum, a, a);
    };
    Simd::store(out + v * W, sum_of_words(words, step));
  }
}

// A squared norm that float arithmetic can be trusted with.
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

inline float inverse_norm(double squared) {
  const double inverse = squared > 0 ? 1 / __builtin_sqrt(squared) : 0;
  return static_cast<float>(inverse < 3e38 ? inverse : 3e38);
}

template <class A>
int64_t factors_with(const RowRange& r, Metric metric, float* out, Workspace& ws) {
  const int64_t dim = r.matrix.dim, words = words_of<A>(dim);
  float* line = ws.floats(kLine, dim);
  int64_t bad = -1;
  for (int64_t i = 0; i < r.count; ++i) {
    const double squared = squared_norm(floats_of(r.matrix, r.row(i), line), dim);
    if (!(squared < __builtin_inf()) && (bad < 0 || r.row(i) < r.row(bad))) bad = i;
    out[i] = metric == Metric::cosine ? inverse_norm(squared) : 1.0f;
  }
  if (metric == Metric::l2) {
    float* panel = ws.floats(kNorms, words * L);
    float norms[L];
    for (int64_t first = 0; first < r.count; first += L) {
      const int n = static_cast<int>(smaller<int64_t>(r.count - first, L));
      pack_lanes<A>(r, first, n, panel, ws);
      squared_norms<A>(panel, words, norms);
      std::memcpy(out + first, norms, static_cast<size_t>(n) * sizeof(float));
    }
  }
  return bad;
}

// Keeps the smallest row that is not finite, of all items.
inline void note_bad(int64_t* bad, int64_t row) {
  int64_t seen = __atomic_load_n(bad, __ATOMIC_RELAXED);
  while (row < seen && !__atomic_compare_exchange_n(bad, &seen, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

struct Terms {  // of score = (dot * a + b) * c + d
  float multiply, add;
};

inline Terms key_terms(Metric metric, float factor) {
  if (metric == Metric::cosine) return {factor, 0};
  return metric == Metric::ip ? Terms{1, 0} : Terms{2, -factor};
}

inline Terms query_terms(Metric metric, float factor) {
  if (metric == Metric::cosine) return {factor, 0};
  return metric == Metric::ip ? Terms{1, 0} : Terms{1, -factor};
}

struct LaneTerms {
  float multiply[L], add[L];
};

// What a segment does to every score. `most` keeps rounding from making a distance negative.
struct SegmentTerms {
  F most, scale, offset, inverse_scale;

  SegmentTerms(const SearchSegment& s, Metric metric)
      : most(Simd::set1(metric == Metric::l2 ? 0.0f : kInf)),
        scale(Simd::set1(s.scale)),
        offset(Simd::set1(s.offset)),
        inverse_scale(Simd::set1(1 / s.scale)) {}
};

inline F last_steps(F inner, F c, F d, const SegmentTerms& s) {
  return Simd::fma(Simd::min(s.most, Simd::fma(inner, c, d)), s.scale, s.offset);
}

inline F finish_score(F dot, F a, F b, F c, F d, const SegmentTerms& s) {
  return last_steps(Simd::fma(dot, a, b), c, d, s);
}

// A block of queries, packed for one segment.
template <class A>
struct PackedQueries {
  int strips;
  int64_t words;
  float* panels;
  LaneTerms* terms;

  PackedQueries(const SearchSegment& s, Metric metric, int64_t first, int64_t count, Workspace& ws)
      : strips(static_cast<int>((count + L - 1) / L)), words(words_of<A>(s.query.dim)) {
    panels = ws.floats(kLanes, strips * words * L);
    terms = reinterpret_cast<LaneTerms*>(ws.floats(kState, strips * 2 * L));
    const RowRange range{s.query, nullptr, first, count};
    for (int t = 0; t < strips; ++t) {
      const int n = static_cast<int>(smaller<int64_t>(count - t * L, L));
      pack_lanes<A>(range, t * L, n, panels + t * words * L, ws);
      for (int lane = 0; lane < L; ++lane) {
        const Terms q = lane < n ? query_terms(metric, s.query_factor[first + t * L + lane]) : Terms{0, 0};
        terms[t].multiply[lane] = q.multiply;
        terms[t].add[lane] = q.add;
      }
    }
  }
  const float* panel(int t) const { return panels + t * words * L; }
};

// What a block of keys brings to its scores, found while the block is at hand.
struct BlockTerms {
  float multiply[NB], add[NB];

  template <class A>
  BlockTerms(A, const RowRange& keys, Metric metric, int64_t first, int n, int64_t* bad, Workspace& ws) {
    float factor[NB];
    const RowRange block{keys.matrix, keys.index, keys.first + first, n};
    const int64_t at = factors_with<A>(block, metric, factor, ws);
    if (at >= 0) note_bad(bad, block.row(at));
    for (int i = 0; i < n; ++i) {
      const Terms k = key_terms(metric, factor[i]);
      multiply[i] = k.multiply;
      add[i] = k.add;
    }
  }
};

// Finished scores of R rows with a strip of queries.
template <class A, int R>
inline __attribute__((always_inline)) void finished_tile(const SegmentTerms& s, const float* block, int first,
                                                         const PackedQueries<A>& queries, int t, const BlockTerms& keys,
                                                         F (&acc)[R][NV]) {
  score_tile<A, R>(block, first, queries.panel(t), queries.words, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const F a = Simd::set1(keys.multiply[first + r]), b = Simd::set1(keys.add[first + r]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const LaneTerms& lane = queries.terms[t];
      const F c = Simd::load(lane.multiply + v * W), d = Simd::load(lane.add + v * W);
      acc[r][v] = finish_score(acc[r][v], a, b, c, d, s);
    }
  }
}

inline int32_t id_at(const SearchSegment& s, int64_t position) {
  return static_cast<int32_t>(s.rows ? s.rows[position] : position);
}

inline float just_below(float x) {
  uint32_t u = bits_of_float(x);
  if (x != x || u == 0xff800000u) return x;
  if ((u << 1) == 0) return float_from_bits(0x80000001u);
  return float_from_bits(u >> 31 ? u + 1 : u - 1);
}

}  // namespace
