// The best k of every query: scores of a tile against a threshold per query; labels and exclusions are looked at for
// survivors only.

namespace {

struct TopkState {
  const TopkItem& item;
  float* threshold;  // [strips * L]; a score must be above
  bool ids_ascend;   // ids only grow so far: a tie with the k-th best loses

  int64_t at(int64_t q) const { return q * item.room; }

  void tighten(int64_t q) {
    const float kth = keep_best(item.scores + at(q), item.ids + at(q), item.found[q], item.k);
    item.found[q] = item.k;
    raise(q, kth);
  }

  // k of the query's keys reach this score.
  void raise(int64_t q, float kth) {
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

  bool wanted(int64_t q, int32_t id) const {
    const TopkFilter& f = item.filter;
    const int64_t query = item.first_query + q;
    if (f.exclude && f.exclude[query] == id) return false;
    return !(f.query_labels && f.query_labels[query] >= 0 && f.query_labels[query] == f.key_labels[id]);
  }

  void add(int64_t q, float score, int32_t id) {
    const int64_t n = item.found[q]++;
    item.scores[at(q) + n] = score;
    item.ids[at(q) + n] = id;
  }

  void offer(int64_t q, float score, int32_t id) {
    if (!wanted(q, id)) return;
    add(q, score, id);
    if (item.found[q] == item.capacity) tighten(q);
  }
};

template <class A>
void score_segment(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, TopkState& state,
                   int64_t* bad, Workspace& ws) {
  const PackedQueries<A> queries(s, item.metric, item.first_query, item.n_queries, ws);
  const SegmentTerms constant(s, item.metric);
  float* block = ws.floats(kRows, chunks_of(queries.words) * NB * CHUNK);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t first = begin; first < end; first += NB) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    pack_rows<A>(keys, first, n, block);
    const BlockTerms terms(A{}, keys, item.metric, first, n, bad, ws);
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

#ifdef FASTCOMPAT_BF16

// Candidates of one segment whose scores are lower bounds but for the first `exact[q]`; a candidate's score is at most
// `spread[q]` above its bound.
struct Bounded {
  TopkState& state;
  const SearchSegment& s;
  Workspace& ws;
  int64_t* exact;  // [n_queries]
  float* spread;   // [n_queries]

  Bounded(TopkState& state, const SearchSegment& s, Workspace& ws) : state(state), s(s), ws(ws) {
    const TopkItem& item = state.item;
    exact = reinterpret_cast<int64_t*>(ws.floats(kState, 3 * item.n_queries));
    spread = reinterpret_cast<float*>(exact + item.n_queries);
    for (int64_t q = 0; q < item.n_queries; ++q) {
      exact[q] = item.found[q];
      spread[q] = 0;
    }
  }

  void offer(int64_t q, float low, float high, int32_t id) {
    if (!state.wanted(q, id)) return;
    state.add(q, low, id);
    const float gap = high - low;
    if (!(gap <= spread[q])) spread[q] = gap == gap ? gap : kInf;
    if (state.item.found[q] < state.item.capacity) return;
    squeeze(q);
    if (state.item.found[q] > (state.item.k + state.item.capacity) / 2) settle(q);
  }

  // Drops the candidates that k others surely beat.
  void squeeze(int64_t q) {
    const TopkItem& item = state.item;
    float* scores = item.scores + state.at(q);
    int32_t* ids = item.ids + state.at(q);
    const int64_t n = item.found[q];
    const float kth = kth_best(scores, n, item.k).bar;
    const float limit = just_below(static_cast<float>(kth - spread[q] * (1 + 0x1p-20)));
    int64_t kept = 0, kept_exact = 0;
    for (int64_t i = 0; i < n; ++i) {
      scores[kept] = scores[i];
      ids[kept] = ids[i];
      kept += !(scores[i] < limit);
      if (i + 1 == exact[q]) kept_exact = kept;
    }
    item.found[q] = kept;
    exact[q] = kept_exact;
    state.raise(q, kth);
  }

  // The rows of the next candidates: they lie anywhere in memory.
  inline __attribute__((always_inline)) void fetch(const int32_t* ids, int64_t n) const {
    for (int64_t i = 0; i < smaller<int64_t>(n, W); ++i) prefetch_row(s.keys, ids[i]);
  }

  // Scores every candidate exactly and keeps the best k.
  void settle(int64_t q) {
    const TopkItem& item = state.item;
    const int64_t query = item.first_query + q;
    float* scores = item.scores + state.at(q);
    int32_t* ids = item.ids + state.at(q);
    if (exact[q] < item.found[q]) {
      float* line = ws.floats(kLine, s.query.dim);
      const float* x = floats_of(s.query, query, line);
      const Terms terms = query_terms(item.metric, s.query_factor[query]);
      for (int64_t i = exact[q]; i < item.found[q]; i += W) {
        const int n = static_cast<int>(smaller<int64_t>(W, item.found[q] - i));
        float out[W];
        fetch(ids + i + W, item.found[q] - i - W);
        exact_scores(s, item.metric, x, terms, ids + i, n, out, ws);
        std::memcpy(scores + i, out, static_cast<size_t>(n) * sizeof(float));
      }
    }
    if (item.found[q] > item.k) state.tighten(q);
    exact[q] = item.found[q];
    spread[q] = 0;
  }
};

void screen_segment(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, TopkState& state,
                    int64_t* bad, Workspace& ws) {
  [[maybe_unused]] const Screen::Scope scope;
  const ScreenedQueries queries(s, item.metric, item.first_query, item.n_queries, ws);
  const SegmentTerms segment(s, item.metric);
  const int64_t block_floats = ScreenBlock::floats(queries.words);
  float* packed = s.packed ? s.packed + begin / NB * block_floats : ws.floats(kRows, block_floats);
  float* dots = ws.floats(kScores, NB * L);
  Passed passed;
  Bounded candidates(state, s, ws);
  const RowRange keys{s.keys, s.rows, 0, s.count};
  const int64_t row_floats = ScreenBlock::row_floats(queries.words);
  const RowRange kept{{s.packed, DType::f32, s.count, row_floats, row_floats}, nullptr, 0, s.count};
  for (int64_t first = begin; first < end; first += NB, packed += s.packed ? block_floats : 0) {
    const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
    ScreenBlock block(packed, queries.words);
    if (!s.packed) block.fill(keys, item.metric, first, n, bad, ws);
    for (int t = 0; t < queries.strips; ++t) {
      const Ahead ahead{s.packed ? kept : keys, first + NB, t, queries.strips};
      score_block<Screen>(block.rows, n, queries.panel(t), queries.words, dots, ahead);
      state.refresh(t);
      float* threshold = state.threshold + t * L;
      for (int from = 0; from < n; from += Passed::kRows) {
        screen_rows(block, dots, from, smaller(from + Passed::kRows, n), queries.strip[t], segment, threshold, passed);
        for (int i = 0; i < passed.count; ++i) {
          const int lane = passed.lane[i];
          if (t * L + lane < item.n_queries && !(passed.high[i] <= threshold[lane]))  // it may have risen since
            candidates.offer(t * L + lane, passed.low[i], passed.high[i], id_at(s, first + passed.row[i]));
        }
      }
    }
  }
  for (int64_t q = 0; q < item.n_queries; ++q) {
    if (item.found[q] > item.k) candidates.squeeze(q);
    candidates.settle(q);
  }
}

// Bounds pay where few of many keys pass.
inline bool screening_pays(const TopkItem& item, const SearchSegment& s, int64_t keys) {
  return s.scale > 0 && item.k > 0 && keys >= 32 * item.k;
}
#endif

int64_t packed_floats([[maybe_unused]] const Matrix& keys) {
#ifdef FASTCOMPAT_BF16
  return with_search_arithmetic(keys, [&](auto a) {
    return decltype(a)::PACK == 1 ? ScreenBlock::floats(words_of<Screen>(keys.dim)) : int64_t{0};
  });
#else
  return 0;
#endif
}

void pack_item([[maybe_unused]] const PackItem& item, [[maybe_unused]] Workspace& ws) {
#ifdef FASTCOMPAT_BF16
  const int64_t words = words_of<Screen>(item.keys.matrix.dim);
  float* out = item.out;
  for (int64_t first = item.begin; first < item.end; first += NB, out += ScreenBlock::floats(words)) {
    const int n = static_cast<int>(smaller<int64_t>(item.end - first, NB));
    ScreenBlock(out, words).fill(item.keys, item.metric, first, n, item.bad, ws);
  }
#endif
}

// The scores of a segment by the quickest way that is exact.
void search_segment(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, TopkState& state,
                    int64_t* bad, Workspace& ws) {
  with_search_arithmetic(s.keys, [&](auto a) {
#ifdef FASTCOMPAT_BF16
    if (decltype(a)::PACK == 1 && screening_pays(item, s, end - begin))
      return screen_segment(item, s, begin, end, state, bad, ws);
#endif
    score_segment<decltype(a)>(item, s, begin, end, state, bad, ws);
  });
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
    // Whole blocks: those that begin among the item's positions.
    const auto block_at = [&](int64_t position) {
      return position <= start ? 0 : (position - start + NB - 1) / NB * NB;
    };
    const int64_t begin = block_at(item.begin), end = smaller(block_at(item.end), s.count);
    start += s.count;
    if (begin >= end) continue;
    if (!first_touched && state.ids_ascend) {
      state.ids_ascend = false;
      for (int64_t q = 0; q < item.n_queries; ++q) threshold[q] = just_below(threshold[q]);
    }
    first_touched = false;
    search_segment(item, s, begin, end, state, item.bad + i, ws);
  }
  for (int64_t q = 0; q < item.n_queries; ++q)
    if (item.found[q] > item.k) state.tighten(q);
}

}  // namespace
