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
    F acc = Simd::set1(0.0f);
    for (int64_t w = 0; w < words; ++w) {
      const F a = Simd::load(panel + w * L + v * W);
      acc = A::step(acc, a, a);
    }
    Simd::store(out + v * W, acc);
  }
}

// Squared norm of a row, +inf or NaN when the row is not finite. In double where float could overflow or underflow.
inline double squared_norm(const float* row, int64_t dim) {
  F acc[4] = {Simd::set1(0.0f), Simd::set1(0.0f), Simd::set1(0.0f), Simd::set1(0.0f)};
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W)
    for (int v = 0; v < 4; ++v) {
      const F a = Simd::load(row + d + v * W);
      acc[v] = Simd::fma(a, a, acc[v]);
    }
  float lanes[W], sum = 0;
  Simd::store(lanes, Simd::add(Simd::add(acc[0], acc[1]), Simd::add(acc[2], acc[3])));
  for (int lane = 0; lane < W; ++lane) sum += lanes[lane];
  for (; d < dim; ++d) sum += row[d] * row[d];
  if (sum > 1e-30f && sum < 1e37f) return sum;
  double exact = 0;
  for (d = 0; d < dim; ++d) exact += static_cast<double>(row[d]) * row[d];
  return exact;
}

template <class A>
int64_t factors_with(const RowRange& r, Metric metric, float* out, Workspace& ws) {
  const int64_t dim = r.matrix.dim, words = words_of<A>(dim);
  float* line = ws.floats(kMisc, dim);
  for (int64_t i = 0; i < r.count; ++i) {
    const float* row = line;
    if (r.matrix.dtype == DType::f32)
      row = static_cast<const float*>(row_pointer(r.matrix, r.row(i)));
    else
      to_floats(line, r.matrix, r.row(i), 0, dim);
    const double total = squared_norm(row, dim);
    if (!(total < __builtin_inf())) return i;
    const double inverse = total > 0 ? 1 / __builtin_sqrt(total) : 0;
    out[i] = metric == Metric::cosine ? static_cast<float>(inverse < 3e38 ? inverse : 3e38) : 1.0f;
  }
  if (metric == Metric::l2) {
    float* panel = ws.floats(kLanes, words * L);
    float norms[L];
    for (int64_t first = 0; first < r.count; first += L) {
      const int n = static_cast<int>(smaller<int64_t>(r.count - first, L));
      pack_lanes<A>(r, first, n, panel, ws);
      squared_norms<A>(panel, words, norms);
      std::memcpy(out + first, norms, static_cast<size_t>(n) * sizeof(float));
    }
  }
  return -1;
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
  F most, scale, offset;

  SegmentTerms(const SearchSegment& s, Metric metric)
      : most(Simd::set1(metric == Metric::l2 ? 0.0f : kInf)),
        scale(Simd::set1(s.scale)),
        offset(Simd::set1(s.offset)) {}
};

inline F finish_score(F dot, F a, F b, const LaneTerms& lane, int v, const SegmentTerms& s) {
  const F inner = Simd::fma(dot, a, b);
  const F score = Simd::fma(inner, Simd::load(lane.multiply + v * W), Simd::load(lane.add + v * W));
  return Simd::fma(Simd::min(s.most, score), s.scale, s.offset);
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

struct BlockTerms {
  float multiply[NB], add[NB];

  BlockTerms(const SearchSegment& s, Metric metric, int64_t first, int n) {
    for (int i = 0; i < n; ++i) {
      const Terms k = key_terms(metric, s.key_factor[first + i]);
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
    for (int v = 0; v < NV; ++v) acc[r][v] = finish_score(acc[r][v], a, b, queries.terms[t], v, s);
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

// ---- top-k ----

struct TopkState {
  const TopkItem& item;
  float* threshold;  // [strips * L]; a score must be above
  bool ids_ascend;   // ids only grow so far: a tie with the k-th best loses

  int64_t at(int64_t q) const { return q * item.room; }

  void tighten(int64_t q) {
    const float kth = keep_best(item.scores + at(q), item.ids + at(q), item.found[q], item.k);
    item.found[q] = item.k;
    threshold[q] = ids_ascend ? kth : just_below(kth);
    float* shared = item.shared + item.first_query + q;
    float seen;
    __atomic_load(shared, &seen, __ATOMIC_RELAXED);
    while (seen < kth && !__atomic_compare_exchange(shared, &seen, const_cast<float*>(&kth), true, __ATOMIC_RELAXED,
                                                    __ATOMIC_RELAXED)) {
    }
  }

  // What other items found out meanwhile; their ids may be larger, so a tie still counts.
  void refresh(int t) {
    for (int64_t q = t * L; q < smaller<int64_t>((t + 1) * L, item.n_queries); ++q) {
      float seen;
      __atomic_load(item.shared + item.first_query + q, &seen, __ATOMIC_RELAXED);
      if (seen > threshold[q]) threshold[q] = just_below(seen);
    }
  }

  void offer(int64_t q, float score, int32_t id) {
    const TopkFilter& f = item.filter;
    const int64_t query = item.first_query + q;
    if (f.exclude && f.exclude[query] == id) return;
    if (f.query_labels && f.query_labels[query] >= 0 && f.query_labels[query] == f.key_labels[id]) return;
    const int64_t n = item.found[q]++;
    item.scores[at(q) + n] = score;
    item.ids[at(q) + n] = id;
    if (item.found[q] == item.capacity) tighten(q);
  }
};

template <class A>
void topk_segment(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, TopkState& state,
                  Workspace& ws) {
  const PackedQueries<A> queries(s, item.metric, item.first_query, item.n_queries, ws);
  const SegmentTerms constant(s, item.metric);
  float* block = ws.floats(kRows, chunks_of(queries.words) * NB * CHUNK);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t first = begin; first < end; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    pack_rows<A>(keys, first, n, block);
    const BlockTerms terms(s, item.metric, first, n);
    for (int t = 0; t < queries.strips; ++t) {
      float* threshold = state.threshold + t * L;
      state.refresh(t);
      const Ahead ahead{keys, first + NB, t, queries.strips};
      for (int from = 0; from < n; from += MR) {
        ahead.fetch(from / MR);
        with_count<MR>(smaller(n - from, MR), [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          F acc[R][NV];
          finished_tile<A, R>(constant, block, from, queries, t, terms, acc);
          uint32_t any = 0;
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            F top = Simd::set1(-kInf);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) top = Simd::max(acc[r][v], top);  // a NaN loses: finite inputs that overflowed
            any |= Simd::bits(Simd::gt(top, Simd::load(threshold + v * W)));
          }
          if (!any) return;
          float scores[R * L + W];
          int32_t places[R * L + W];
          int hits = 0;
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              const M above = Simd::gt(acc[r][v], Simd::load(threshold + v * W));
              hits += Simd::append(above, acc[r][v], r * L + v * W, scores + hits, places + hits);
            }
          for (int h = 0; h < hits; ++h) {
            const int lane = places[h] % L;
            if (scores[h] > threshold[lane])  // it may have risen since
              state.offer(t * L + lane, scores[h], id_at(s, first + from + places[h] / L));
          }
        });
      }
    }
  }
}

void topk_item(const TopkItem& item, Workspace& ws) {
  const int64_t lanes = (item.n_queries + L - 1) / L * L;
  float* threshold = ws.floats(kOut, lanes);
  for (int64_t q = 0; q < lanes; ++q) threshold[q] = q < item.n_queries && item.k ? -kInf : kInf;
  for (int64_t q = 0; q < item.n_queries; ++q) item.found[q] = 0;
  TopkState state{item, threshold, true};
  int64_t start = 0;
  bool first_touched = true;
  for (int i = 0; i < item.n_segments; ++i) {
    const SearchSegment& s = item.segments[i];
    const int64_t begin = item.begin > start ? item.begin - start : 0;
    const int64_t end = smaller(item.end - start, s.count);
    start += s.count;
    if (begin >= end) continue;
    if (!first_touched && state.ids_ascend) {
      state.ids_ascend = false;
      for (int64_t q = 0; q < item.n_queries; ++q) threshold[q] = just_below(threshold[q]);
    }
    first_touched = false;
    with_search_arithmetic(s.keys, [&](auto a) { topk_segment<decltype(a)>(item, s, begin, end, state, ws); });
  }
  for (int64_t q = 0; q < item.n_queries; ++q)
    if (item.found[q] > item.k) state.tighten(q);
}

// ---- beat-counts ----

// How many of a block's scores [n][L] beat each lane's threshold; equal scores fall to the smaller id.
inline void count_block(const float* scores, int n, const int32_t* ids, const float* thresholds, const int32_t* target,
                        int32_t* counts) {
  for (int v = 0; v < NV; ++v) {
    const F limit = Simd::load(thresholds + v * W);
    I count = Simd::set1(int32_t{0});
    for (int i = 0; i < n; ++i) {
      const F score = Simd::load(scores + i * L + v * W);
      count = Simd::count(count, Simd::gt(score, limit));
      for (uint32_t ties = Simd::bits(Simd::eq(score, limit)); ties; ties &= ties - 1) {
        const int lane = v * W + __builtin_ctz(ties);
        counts[lane] += ids[i] < target[lane];
      }
    }
    int32_t whole[W];
    Simd::store(whole, count);
    for (int lane = 0; lane < W; ++lane) counts[v * W + lane] += whole[lane];
  }
}

template <class A>
void beats_with(const BeatsItem& item, Workspace& ws) {
  const SearchSegment& s = *item.segment;
  const PackedQueries<A> queries(s, item.metric, item.first_query, item.n_queries, ws);
  const SegmentTerms constant(s, item.metric);
  const int64_t targets = item.targets, per_strip = targets * L;
  float* block = ws.floats(kRows, chunks_of(queries.words) * NB * CHUNK);
  float* scores = ws.floats(kScores, NB * L);
  float* thresholds = ws.floats(kOut, queries.strips * per_strip);
  int32_t* target_ids = reinterpret_cast<int32_t*>(ws.floats(kMisc, queries.strips * per_strip));
  int32_t* counts = reinterpret_cast<int32_t*>(ws.floats(kRowPairs, queries.strips * per_strip));
  for (int64_t q = 0; q < queries.strips * L; ++q)
    for (int64_t p = 0; p < targets; ++p) {
      const int64_t at = (q / L) * per_strip + p * L + q % L, from = (item.first_query + q) * targets + p;
      const bool real = q < item.n_queries && item.threshold_ids[from] >= 0;
      thresholds[at] = real ? item.thresholds[from] : kInf;
      target_ids[at] = real ? static_cast<int32_t>(item.threshold_ids[from]) : -1;
    }
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t b = 0; b < item.blocks; ++b) {
    const int64_t begin = item.bounds[b] > item.begin ? item.bounds[b] : item.begin;
    const int64_t end = smaller(item.bounds[b + 1], item.end);
    if (begin >= end) continue;
    std::memset(counts, 0, static_cast<size_t>(queries.strips * per_strip) * sizeof(int32_t));
    for (int64_t first = begin; first < end; first += NB) {
      const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
      pack_rows<A>(keys, first, n, block);
      const BlockTerms terms(s, item.metric, first, n);
      int32_t ids[NB];
      for (int i = 0; i < n; ++i) ids[i] = id_at(s, first + i);
      for (int t = 0; t < queries.strips; ++t) {
        for (int from = 0; from < n; from += MR)
          with_count<MR>(smaller(n - from, MR), [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            F acc[R][NV];
            finished_tile<A, R>(constant, block, from, queries, t, terms, acc);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
              for (int v = 0; v < NV; ++v) Simd::store(scores + (from + r) * L + v * W, acc[r][v]);
          });
        if (item.exclude)
          for (int lane = 0; lane < smaller<int64_t>(L, item.n_queries - t * L); ++lane) {
            const int64_t hole = item.exclude[item.first_query + t * L + lane];
            for (int i = 0; hole >= 0 && i < n; ++i)
              if (ids[i] == hole) scores[i * L + lane] = -kInf;
          }
        for (int64_t p = 0; p < targets; ++p) {
          const int64_t at = t * per_strip + p * L;
          count_block(scores, n, ids, thresholds + at, target_ids + at, counts + at);
        }
      }
    }
    for (int64_t q = 0; q < item.n_queries; ++q)
      for (int64_t p = 0; p < targets; ++p) {
        const int32_t count = counts[(q / L) * per_strip + p * L + q % L];
        if (count)
          __atomic_fetch_add(item.out + ((item.first_query + q) * targets + p) * item.blocks + b, count,
                             __ATOMIC_RELAXED);
      }
  }
}

// ---- scores of chosen pairs ----

template <class A>
void pairs_with(const PairItem& item, Workspace& ws) {
  const SearchSegment& s = *item.segment;
  const PackedQueries<A> queries(s, item.metric, item.first_query, item.n_queries, ws);
  float* keys = ws.floats(kRows, queries.words * L);
  int64_t ids[L];
  float factor[L];
  const SegmentTerms constant(s, item.metric);
  for (int t = 0; t < queries.strips; ++t) {
    const int n = static_cast<int>(smaller<int64_t>(item.n_queries - t * L, L));
    const float* panel = queries.panel(t);
    const int64_t first = item.first_query + t * L;
    for (int64_t p = 0; p < item.targets; ++p) {
      for (int lane = 0; lane < n; ++lane) {
        const int64_t id = item.ids[(first + lane) * item.targets + p];
        ids[lane] = id < 0 ? 0 : id;
      }
      const RowRange range{s.keys, ids, 0, n};
      pack_lanes<A>(range, 0, n, keys, ws);
      LaneTerms terms = {};
      for (int lane = 0; lane < n; ++lane) factor[lane] = s.key_factor[ids[lane]];
      for (int lane = 0; lane < n; ++lane) {
        const Terms k = key_terms(item.metric, factor[lane]);
        terms.multiply[lane] = k.multiply;
        terms.add[lane] = k.add;
      }
      for (int v = 0; v < NV; ++v) {
        F acc = Simd::set1(0.0f);
        for (int64_t w = 0; w < queries.words; ++w)
          acc = A::step(acc, Simd::load(keys + w * L + v * W), Simd::load(panel + w * L + v * W));
        const F a = Simd::load(terms.multiply + v * W), b = Simd::load(terms.add + v * W);
        float scores[W];
        Simd::store(scores, finish_score(acc, a, b, queries.terms[t], v, constant));
        for (int lane = v * W; lane < smaller(n, (v + 1) * W); ++lane) {
          const int64_t at = (first + lane) * item.targets + p;
          item.out[at] = item.ids[at] < 0 ? -kInf : scores[lane - v * W];
        }
      }
    }
  }
}

}  // namespace
