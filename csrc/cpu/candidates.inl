// The candidates of a search: the best so far of every query with the score that the next one must beat, and candidates
// whose scores are known by bounds alone until it is clear that they are needed.
#pragma once
#include "screen.inl"
#include "select.inl"

namespace {

struct TopkState {
  const TopkItem& item;
  float* threshold;  // [strips * L]; a score must be above
  bool ids_ascend;   // ids only grow so far: a tie with the k-th best loses

  int64_t at(int64_t q) const { return q * item.room; }

  // From now on a tie may win.
  void take_any_order() {
    if (!ids_ascend) return;
    ids_ascend = false;
    for (int64_t q = 0; q < item.n_queries; ++q) threshold[q] = just_below(threshold[q]);
  }

  void tighten(int64_t q) {
    const float kth = keep_best(item.scores + at(q), item.ids + at(q), item.found[q], item.k);
    item.found[q] = item.k;
    raise(q, kth);
  }

  // k of the query's keys reach this score.
  void raise(int64_t q, float kth) {
    threshold[q] = ids_ascend ? kth : just_below(kth);
    float* shared = item.shared + q;
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
      __atomic_load(item.shared + q, &seen, __ATOMIC_RELAXED);
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
    if (id < 0 || !wanted(q, id)) return;
    add(q, score, id);
    if (item.found[q] == item.capacity) tighten(q);
  }
};

// Candidates whose scores are lower bounds, but for those before the first segment's; a candidate's score is at most
// `max_width[q]` above its bound. Until its score is exact a candidate goes by its row, then by its id.
struct BoundedCandidates {
  TopkState& state;
  Workspace& ws;
  int64_t* starts;   // [n_segments, n_queries] where each segment's candidates start
  float* max_width;  // [n_queries]
  int current = 0;   // segment

  BoundedCandidates(TopkState& state, Workspace& ws) : state(state), ws(ws) {
    const int64_t queries = state.item.n_queries, segments = state.item.n_segments;
    starts = reinterpret_cast<int64_t*>(ws.floats(kStarts, (2 * segments + 1) * queries));
    max_width = reinterpret_cast<float*>(starts + segments * queries);
    for (int64_t q = 0; q < queries; ++q) max_width[q] = 0;
  }

  int64_t& start(int segment, int64_t q) const { return starts[segment * state.item.n_queries + q]; }

  void enter(int segment) {
    current = segment;
    for (int64_t q = 0; q < state.item.n_queries; ++q) start(segment, q) = state.item.found[q];
  }

  // From now on all of the query's candidates count as exact.
  void mark_exact(int64_t q) {
    for (int i = 0; i <= current; ++i) start(i, q) = state.item.found[q];
    max_width[q] = 0;
  }

  void offer(int64_t q, float low, float high, int32_t row) {
    const int32_t id = state.item.segments[current].item(row);
    if (id < 0 || !state.wanted(q, id)) return;
    state.add(q, low, row);
    const float gap = high - low;
    if (!(gap <= max_width[q])) max_width[q] = gap == gap ? gap : kInf;
    if (state.item.found[q] < state.item.capacity) return;
    prune(q);
    if (state.item.found[q] > (state.item.k + state.item.capacity) / 2) rescore(q);
  }

  // Drops the candidates that k others surely beat.
  void prune(int64_t q) {
    const TopkItem& item = state.item;
    float* scores = item.scores + state.at(q);
    int32_t* ids = item.ids + state.at(q);
    const int64_t n = item.found[q];
    constexpr double kSpare = 0x1p-20;  // the width was a rounded difference
    const float kth = kth_best(scores, n, item.k).value;
    const float limit = just_below(static_cast<float>(kth - max_width[q] * (1 + kSpare)));
    int64_t count = 0, i = 0;
    const auto compact_until = [&](int64_t end) {
      for (; i < end; ++i) {
        scores[count] = scores[i];
        ids[count] = ids[i];
        count += !(scores[i] < limit);
      }
    };
    for (int segment = 0; segment <= current; ++segment) {
      compact_until(start(segment, q));
      start(segment, q) = count;
    }
    compact_until(n);
    item.found[q] = count;
    state.raise(q, kth);
  }

  // The rows of the next candidates: they lie anywhere in memory.
  static inline __attribute__((always_inline)) void fetch(const Matrix& keys, const int32_t* ids, int64_t n) {
    for (int64_t i = 0; i < smaller<int64_t>(n, W); ++i) prefetch_row(keys, ids[i]);
  }

  // Scores candidates from .. to of a segment exactly; from here on they go by their ids.
  void score(const SearchSegment& s, int64_t q, int64_t from, int64_t to) {
    if (from == to) return;
    const TopkItem& item = state.item;
    const int64_t query = item.first_query + q;
    float* scores = item.scores + state.at(q);
    int32_t* ids = item.ids + state.at(q);
    const float factor = s.query_factor[query];
    with_search_arithmetic(s.keys, item.metric, [&](auto a) {
      using A = decltype(a);
      const float* x = words_of_row<A>(s.query, query, ws.floats(kRow, padded(s.query.dim)));
      for (int64_t i = from; i < to; i += W) {
        const int n = static_cast<int>(smaller<int64_t>(W, to - i));
        float out[W];
        fetch(s.keys, ids + i + W, to - i - W);
        exact_scores<A>(s, item.metric, x, factor, ids + i, n, out, ws);
        std::memcpy(scores + i, out, static_cast<size_t>(n) * sizeof(float));
      }
    });
    if (s.items)
      for (int64_t i = from; i < to; ++i) ids[i] = s.items[ids[i]];
  }

  // Scores every candidate exactly and keeps the best k.
  void rescore(int64_t q) {
    const TopkItem& item = state.item;
    for (int i = 0; i < current; ++i) score(item.segments[i], q, start(i, q), start(i + 1, q));
    score(item.segments[current], q, start(current, q), item.found[q]);
    if (item.found[q] > item.k) state.tighten(q);
    mark_exact(q);
  }

  void rescore_all() {
    for (int64_t q = 0; q < state.item.n_queries; ++q) {
      const int64_t n = state.item.found[q];
      if (n > state.item.k && n > start(0, q)) prune(q);
      rescore(q);
    }
  }
};

// Screens the blocks of one segment for all queries of an item.
struct SegmentScreen {
  BoundedCandidates& candidates;
  TopkState& state;
  const SearchSegment& s;
  SegmentTerms segment;

  SegmentScreen(BoundedCandidates& candidates, const SearchSegment& s)
      : candidates(candidates), state(candidates.state), s(s), segment(s) {}

  // Products [n][L] of keys from position `first` on and strip t.
  template <bool UNITS>
  void block(const KeyBounds& keys, const ErrorFactors& most, const float* products, int64_t first, int n,
             const QueryBounds& queries, int t) {
    state.refresh(t);
    const float* threshold = state.threshold + t * L;
    screen_block<UNITS>(
        keys, most, products, n, queries, segment, threshold, [&](int row, int lane, float low, float high) {
          if (t * L + lane < state.item.n_queries && !(high <= threshold[lane]))  // it may have risen since
            candidates.offer(t * L + lane, low, high, static_cast<int32_t>(s.row(first + row)));
        });
  }
};

}  // namespace
