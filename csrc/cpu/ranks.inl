// Beat-counts: every score is counted in its interval between a query's thresholds. Where the instruction set screens,
// bounds of a score mostly tell its interval; the exact score is found where they do not.
#pragma once
#include "histogram.inl"
#include "screen_quantised.inl"

namespace {

// What counting needs for the queries of an item: one block of keys at a time comes in, with scores or bounds.
struct Beats {
  const BeatsItem& item;
  const SearchSegment& s;
  HistogramSizes sizes;
  int strips;
  BinMap* maps;
  float* tables;
  int32_t* counts;
  float* scores;  // [NB][L], or products
  int32_t *low, *high, *unresolved;
  int n;       // keys of the block
  int binned;  // of them with a score that is not in its main interval: the rows of low and high
  int32_t ids[NB], row[NB];

  Beats(const BeatsItem& item, Workspace& ws)
      : item(item),
        s(*item.segment),
        sizes(item.targets),
        strips(static_cast<int>((item.n_queries + L - 1) / L)),
        maps(reinterpret_cast<BinMap*>(ws.floats(kBinMaps, strips * int64_t{sizeof(BinMap) / sizeof(float)}))),
        tables(ws.floats(kBinTables, strips * sizes.table_floats())),
        counts(reinterpret_cast<int32_t*>(ws.floats(kCounts, strips * sizes.counts()))),
        scores(ws.floats(kScores, 4 * NB * L + 1)),
        low(reinterpret_cast<int32_t*>(scores + NB * L)),
        high(low + NB * L),
        unresolved(high + NB * L),
        n(0),
        binned(0) {
    for (int t = 0; t < strips; ++t) strip(t).prepare();
  }

  StripHistogram strip(int t) const {
    return {sizes,
            maps[t],
            item.thresholds + (item.first_query + t * L) * item.targets,
            static_cast<int>(smaller<int64_t>(L, item.n_queries - t * L)),
            reinterpret_cast<uint16_t*>(tables + t * sizes.table_floats()),
            counts + t * sizes.counts()};
  }

  bool excluded(int t, int lane, int32_t id) const {
    return item.exclude && t * L + lane < item.n_queries && item.exclude[item.first_query + t * L + lane] == id;
  }

  // A row's scores, known by bounds.
  void offer(const StripHistogram& strip, int i, const F (&least)[NV], const F (&most)[NV]) {
    if (strip.all_main(least, most)) return;
    for (int v = 0; v < NV; ++v) {
      Simd::store(low + binned * L + v * W, strip.map.bin(least[v], v));
      Simd::store(high + binned * L + v * W, strip.map.bin(most[v], v));
    }
    row[binned++] = i;
  }

  // NaN for excluded pairs.
  void mask_excluded(const StripHistogram& strip, int t) {
    for (int lane = 0; item.exclude && lane < strip.lanes; ++lane)
      for (int i = 0; i < n; ++i)
        if (excluded(t, lane, ids[i])) scores[i * L + lane] = kNan;
  }

  // Counts what was offered of a strip; resolve(bin in low and high, row) for each ambiguous pair. Returns how many.
  template <bool TWO, class Resolve>
  int count(const StripHistogram& strip, Resolve&& resolve) {
    strip.count_main(n - binned);
    const int n_unresolved = strip.count<TWO>(binned, low, high, unresolved);
    for (int d = 0; d < n_unresolved; ++d) resolve(unresolved[d], row[unresolved[d] / L]);
    binned = 0;
    return n_unresolved;
  }

  void choose_main() {
    for (int t = 0; t < strips; ++t) strip(t).choose_main();
  }

  // Calls scorer.block(first) for blocks from position `begin` on, until it returns false; returns where to resume.
  template <class Scorer>
  int64_t walk(Scorer& scorer, int64_t begin) {
    for (int64_t b = 0; b < item.blocks; ++b) {
      int64_t first = item.bounds[b] > begin ? item.bounds[b] : begin;
      const int64_t end = smaller(item.bounds[b + 1], item.end);
      if (first >= end) continue;
      std::memset(counts, 0, static_cast<size_t>(strips * sizes.counts()) * sizeof(int32_t));
      bool more = true;
      for (; more && first < end; first += n) {
        n = static_cast<int>(smaller<int64_t>(end - first, NB));
        for (int i = 0; i < n; ++i) ids[i] = id_at(s, first + i);
        more = scorer.block(first);
        if (first == begin) choose_main();
      }
      add(b);
      choose_main();
      if (!more) return first;
    }
    return item.end;
  }

  void add(int64_t b) const {
    const int64_t targets = item.targets;
    for (int64_t q = 0; q < item.n_queries; ++q) {
      const int32_t* in = counts + q / L * sizes.counts() + q % L;  // [intervals][L]
      int64_t better = 0;
      for (int64_t r = targets - 1; r >= 0; --r) {
        better += in[(r + 1) * L];
        const int64_t at = (item.first_query + q) * targets;
        if (better)
          __atomic_fetch_add(item.out + (at + item.columns[at + r]) * item.blocks + b, better, __ATOMIC_RELAXED);
      }
    }
  }
};

// By exact scores of all pairs.
template <class A>
struct ExactScorer {
  Beats& beats;
  Workspace& ws;
  PackedQueries<A> queries;
  SegmentTerms segment;
  RowRange keys;
  float* rows;

  ExactScorer(Beats& beats, Workspace& ws)
      : beats(beats),
        ws(ws),
        queries(beats.s, beats.item.first_query, beats.item.n_queries, ws),
        segment(beats.s),
        keys{beats.s.keys, beats.s.rows, 0, beats.s.count},
        rows(ws.floats(kBlock, chunks_of(queries.words) * NB * CHUNK)) {}

  bool block(int64_t first) {
    const int n = beats.n;
    float* scores = beats.scores;
    const PackedKeys<A> terms(keys, beats.item.metric, first, n, rows, beats.item.bad, ws);
    for (int t = 0; t < queries.strips; ++t) {
      score(terms, t, {keys, first + n, t, queries.strips});
      const StripHistogram strip = beats.strip(t);
      beats.mask_excluded(strip, t);
      for (int i = 0; i < n; ++i) {
        F row[NV];
        for (int v = 0; v < NV; ++v) row[v] = Simd::load(scores + i * L + v * W);
        beats.offer(strip, i, row, row);
      }
      beats.count<false>(strip, [&](int k, int i) {
        const int64_t at = code_of(scores[i * L + k % L], beats.ids[i]);
        strip.recount(k % L, beats.low[k], beats.high[k], at);
      });
    }
    return true;
  }

  // A function of its own: gcc runs out of registers for the sums where it is inlined.
  __attribute__((noinline)) void score(const PackedKeys<A>& terms, int t, const Prefetch& prefetch) {
    for (int from = 0; from < beats.n; from += MR) {
      prefetch.fetch(from / MR);
      with_count<MR>(smaller(beats.n - from, MR), [&](auto height) {
        constexpr int R = decltype(height)::value;
        F acc[R][NV];
        finished_tile<A, R>(segment, rows, from, queries, t, terms, acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) Simd::store(beats.scores + (from + r) * L + v * W, acc[r][v]);
      });
    }
  }
};

#ifdef FASTCOMPAT_SCREEN

// By bounds of the scores, as long as few pairs are ambiguous.
struct BoundScorer {
  Beats& beats;
  Workspace& ws;
  QuantisedQueries queries;
  SegmentTerms segment;
  RowRange keys;
  QuantisedBlock quantised;

  BoundScorer(Beats& beats, Workspace& ws)
      : beats(beats),
        ws(ws),
        queries(beats.s, beats.item.metric, beats.item.first_query, beats.item.n_queries, ws),
        segment(beats.s),
        keys{beats.s.keys, beats.s.rows, 0, beats.s.count},
        quantised(ws.floats(kBlock, QuantisedBlock::floats(queries.words)), queries.words) {}

  bool block(int64_t first) {
    const int n = beats.n;
    int64_t n_unresolved = 0;
    quantised.fill(keys, beats.item.metric, beats.s.centre, first, n, beats.item.bad, ws);
    for (int t = 0; t < queries.strips; ++t) {
      score_block<Screen>(quantised.rows, n, queries.panel(t), queries.words, beats.scores,
                          {keys, first + n, t, queries.strips});
      const StripHistogram strip = beats.strip(t);
      beats.mask_excluded(strip, t);
      bound_scores(queries.bounds[t], strip);
      n_unresolved += beats.count<true>(strip, [&](int k, int i) { rescore(strip, t, k, i); });
    }
    return n_unresolved * kScoresPerRescore < int64_t{n} * L * queries.strips;
  }

  static constexpr int kScoresPerRescore = 64;  // exact scores in tiles that cost what one ambiguous pair costs

  // The lowest and the highest that each score can be; any, where a bound is NaN.
  void bound_scores(const QueryBounds& q, const StripHistogram& strip) {
    const KeyBounds& keys = quantised.bounds;
    for (int i = 0; i < beats.n; ++i) {
      const F a = Simd::set1(keys.multiply[i]), b = Simd::set1(keys.norm[i]), c = Simd::set1(keys.residual[i]);
      const F above = Simd::set1(keys.high[i]), below = Simd::set1(keys.low[i]);
      F least[NV], most[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const auto of = [&](const float* x) { return Simd::load(x + v * W); };
        const F product = of(beats.scores + i * L), dot = Quantiser::kUnits ? Simd::mul(product, of(q.unit)) : product;
        const F error = Simd::fma(of(q.residual), b, Simd::fma(of(q.norm), c, of(q.own_error)));
        const auto finish = [&](F inner) { return last_steps(inner, of(q.terms.multiply), of(q.terms.add), segment); };
        least[v] = Simd::max(finish(Simd::fma(dot, a, Simd::sub(below, error))), Simd::set1(-kInf));
        most[v] = Simd::min(finish(Simd::fma(dot, a, Simd::add(above, error))), Simd::set1(kInf));
      }
      beats.offer(strip, i, least, most);
    }
  }

  void rescore(const StripHistogram& strip, int t, int k, int i) {
    const int lane = k % L;
    const int32_t id = beats.ids[i];
    const int64_t query = beats.item.first_query + t * L + lane;
    float score[W] = {kNan};
    if (!beats.excluded(t, lane, id)) {
      with_search_arithmetic(beats.s.keys, beats.item.metric, [&](auto a) {
        using A = decltype(a);
        const float* x = words_of_row<A>(beats.s.query, query, ws.floats(kRow, padded(beats.s.query.dim)));
        exact_scores<A>(beats.s, beats.item.metric, x, beats.s.query_factor[query], &id, 1, score, ws);
      });
    }
    strip.recount(lane, beats.low[k], beats.high[k], code_of(score[0], id));
  }
};

#endif

constexpr int kMinBoundQueries = 2 * L;  // for fewer, quantising the keys costs more than the quicker products give

template <class A>
void beats_with(const BeatsItem& item, Workspace& ws) {
  Beats beats(item, ws);
  int64_t begin = item.begin;
#ifdef FASTCOMPAT_SCREEN
  if (A::PACK == 1 && item.n_queries > kMinBoundQueries && item.segment->scale > 0) {
    [[maybe_unused]] const Screen::Scope scope;
    BoundScorer scorer(beats, ws);
    begin = beats.walk(scorer, begin);
  }
#endif
  if (begin >= item.end) return;
  ExactScorer<A> scorer(beats, ws);
  beats.walk(scorer, begin);
}

// ---- scores of chosen pairs ----

template <class A>
void pair_scores_with(const PairItem& item, Workspace& ws) {
  const SearchSegment& s = *item.segment;
  float* line = ws.floats(kRow, padded(s.query.dim));
  for (int64_t q = item.first_query; q < item.first_query + item.n_queries; ++q) {
    const float* x = words_of_row<A>(s.query, q, line);
    const int64_t* ids = item.ids + q * item.targets;
    for (int64_t from = 0; from < item.targets; from += W) {
      const int n = static_cast<int>(smaller<int64_t>(W, item.targets - from));
      int32_t some[W];
      float out[W];
      int real = 0;
      for (int i = 0; i < n; ++i)
        if (ids[from + i] >= 0) some[real++] = static_cast<int32_t>(ids[from + i]);
      if (real) exact_scores<A>(s, item.metric, x, s.query_factor[q], some, real, out, ws);
      for (int i = 0, next = 0; i < n; ++i)
        item.out[q * item.targets + from + i] = ids[from + i] < 0 ? -kInf : out[next++];
    }
  }
}

}  // namespace
