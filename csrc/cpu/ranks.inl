namespace {

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
      const BlockTerms terms(A{}, keys, item.metric, first, n, item.bad, ws);
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
      for (int lane = 0; lane < n; ++lane) factor[lane] = item.key_factor[ids[lane]];
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
        const F c = Simd::load(queries.terms[t].multiply + v * W), d = Simd::load(queries.terms[t].add + v * W);
        Simd::store(scores, finish_score(acc, a, b, c, d, constant));
        for (int lane = v * W; lane < smaller(n, (v + 1) * W); ++lane) {
          const int64_t at = (first + lane) * item.targets + p;
          item.out[at] = item.ids[at] < 0 ? -kInf : scores[lane - v * W];
        }
      }
    }
  }
}

}  // namespace
