// The best k of every query: scores of a tile against a threshold per query; labels and exclusions are looked at for
// survivors only.
#pragma once
#include "screen_quantised.inl"
#include "screen_streaming.inl"

namespace {

template <class A>
void score_segment(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, TopkState& state,
                   int64_t* bad, Workspace& ws) {
  const PackedQueries<A> queries(s, item.first_query, item.n_queries, ws);
  const SegmentTerms constant(s);
  float* block = ws.floats(kBlock, chunks_of(queries.words) * NB * CHUNK);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t first = begin; first < end; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    const PackedKeys<A> terms(keys, item.metric, first, n, block, bad, ws);
    for (int t = 0; t < queries.strips; ++t) {
      float* threshold = state.threshold + t * L;
      state.refresh(t);
      const Prefetch prefetch{keys, first + NB, t, queries.strips};
      for (int from = 0; from < n; from += MR) {
        prefetch.fetch(from / MR);
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
          int32_t cells[R * L + W];
          int hits = 0;
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              const M above = Simd::gt(acc[r][v], Simd::load(threshold + v * W));
              hits += Simd::append(above, acc[r][v], r * L + v * W, scores + hits, cells + hits);
            }
          for (int h = 0; h < hits; ++h) {
            const int lane = cells[h] % L;
            if (scores[h] > threshold[lane])  // it may have risen since
              state.offer(t * L + lane, scores[h], s.item(s.row(first + from + cells[h] / L)));
          }
        });
      }
    }
  }
}

inline bool screening_pays(const TopkItem& item, const SearchSegment& s, int64_t keys) {
  return s.scale > 0 && item.k > 0 && keys >= kKeysPerResult * item.k;
}

// Floats of a packed block; 0 where a copy would save less than a quarter of the keys as floats.
int64_t packed_floats([[maybe_unused]] const Matrix& keys, [[maybe_unused]] Metric metric) {
#ifdef FASTCOMPAT_SCREEN
  const int64_t row = QuantisedBlock::packed_row_floats(words_of<Screen>(keys.dim));
  return with_search_arithmetic(
      keys, metric, [&](auto a) { return decltype(a)::PACK == 1 && 4 * row <= 3 * keys.dim ? NB * row : int64_t{0}; });
#else
  return 0;
#endif
}

void pack_item([[maybe_unused]] const PackItem& item, [[maybe_unused]] Workspace& ws) {
#ifdef FASTCOMPAT_SCREEN
  const int64_t words = words_of<Screen>(item.keys.matrix.dim), row = QuantisedBlock::packed_row_floats(words);
  const QuantisedBlock block(ws.floats(kBlock, QuantisedBlock::floats(words)), words);
  std::memset(block.rows, 0, static_cast<size_t>(QuantisedBlock::floats(words)) * sizeof(float));
  float* out = item.out;
  for (int64_t first = item.begin; first < item.end; first += NB, out += NB * row) {
    const int n = static_cast<int>(smaller<int64_t>(item.end - first, NB));
    QuantisedBlock(block).fill(item.keys, item.metric, item.centre, first, n, item.bad, ws);
    block.store(out);
  }
#endif
}

// The scores of a segment by the quickest way that is exact.
void search_segment(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end,
                    BoundedCandidates& candidates, int64_t* bad, Workspace& ws) {
  with_search_arithmetic(s.keys, item.metric, [&](auto a) {
    using A = decltype(a);
    if (A::PACK == 1 && screening_pays(item, s, end - begin)) {
      if (item.n_queries <= kStreamingQueries && !s.packed)
        return screen_streaming<A>(item, s, begin, end, candidates, bad, ws);
#ifdef FASTCOMPAT_SCREEN
      return screen_quantised(item, s, begin, end, candidates, bad, ws);
#endif
    }
    candidates.rescore_all();
    score_segment<A>(item, s, begin, end, candidates.state, bad, ws);
    for (int64_t q = 0; q < item.n_queries; ++q) candidates.mark_exact(q);
  });
}

void topk_item(const TopkItem& item, Workspace& ws) {
  const int64_t lanes = (item.n_queries + L - 1) / L * L;
  float* threshold = ws.floats(kThresholds, lanes);
  for (int64_t q = 0; q < lanes; ++q) threshold[q] = q < item.n_queries && item.k ? -kInf : kInf;
  for (int64_t q = 0; q < item.n_queries; ++q) item.found[q] = 0;
  TopkState state{item, threshold, true};
  BoundedCandidates candidates(state, ws);
  int64_t start = 0;
  bool first_touched = true;
  for (int i = 0; i < item.n_segments; ++i) {
    const SearchSegment& s = item.segments[i];
    candidates.enter(i);
    // Whole blocks: those that begin among the item's positions.
    const auto block_at = [&](int64_t position) {
      return position <= start ? 0 : (position - start + NB - 1) / NB * NB;
    };
    const int64_t begin = block_at(item.begin), end = smaller(block_at(item.end), s.count);
    start += s.count;
    if (begin >= end) continue;
    if (!first_touched || s.items) state.take_any_order();
    first_touched = false;
    search_segment(item, s, begin, end, candidates, item.bad + i, ws);
  }
  if (item.n_segments > 0) candidates.rescore_all();
}

}  // namespace
