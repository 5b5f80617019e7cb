// The candidates of a search: the best so far of every query with the score that the next one must beat, and candidates
// whose scores are known by bounds alone until it is clear that they are needed.

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

// Screens the blocks of one segment for all queries of an item.
struct Screening {
  TopkState& state;
  const SearchSegment& s;
  SegmentTerms segment;
  Bounded candidates;
  Passed passed;

  Screening(TopkState& state, const SearchSegment& s, Workspace& ws)
      : state(state), s(s), segment(s, state.item.metric), candidates(state, s, ws) {}

  // Products [n][L] of keys from position `first` on and strip t.
  template <bool UNITS>
  void block(const KeyBounds& keys, const float* products, int64_t first, int n, const QueryBounds& queries, int t) {
    state.refresh(t);
    float* threshold = state.threshold + t * L;
    for (int from = 0; from < n; from += Passed::kRows) {
      const int to = smaller(from + Passed::kRows, n);
      screen_rows<UNITS>(keys, products, from, to, queries, segment, threshold, passed);
      for (int i = 0; i < passed.count; ++i) {
        const int lane = passed.lane[i];
        if (t * L + lane < state.item.n_queries && !(passed.high[i] <= threshold[lane]))  // it may have risen since
          candidates.offer(t * L + lane, passed.low[i], passed.high[i], id_at(s, first + passed.row[i]));
      }
    }
  }

  void finish() {
    for (int64_t q = 0; q < state.item.n_queries; ++q) {
      if (state.item.found[q] > state.item.k) candidates.squeeze(q);
      candidates.settle(q);
    }
  }
};

}  // namespace
