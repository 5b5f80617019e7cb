namespace {

// ---- beat-counts ----
//
// The thresholds of a query, ascending, cut its scores into intervals; counting how many scores fall into each gives
// all of its beat-counts. A score's interval is looked up: a rising map takes scores to places in a table, and the map
// takes thresholds there by the same arithmetic, so a score in a place that holds no threshold is on the side of every
// threshold that its place is on. The few in a place that does hold one are in doubt: bisection finds their interval.

constexpr int kMostBelow = (1 << 15) / L - 1;  // the table tells numbers of thresholds up to this one

// A lane's map from scores to places: (score - low) * factor + origin, kept in first .. last.
struct PlaceMap {
  float low[L], factor[L], origin[L], first[L], last[L];

  // Never an infinity times zero: NaN alone gives NaN, which goes to the first place, below all thresholds.
  I place(F score, int v) const {
    const auto of = [&](const float* x) { return Simd::load(x + v * W); };
    const F at = Simd::fma(Simd::sub(score, of(low)), of(factor), of(origin));
    return Simd::truncate(Simd::min(Simd::max(at, of(first)), of(last)));
  }
};

// A score and its id as one number that is larger for the better of two; NaN beats nothing.
inline int64_t standing(float score, int32_t id) { return score == score ? standing_of(score, id) : INT64_MIN; }

// The sizes that all strips of an item share.
struct IntervalSizes {
  static constexpr int places = 256;  // of a lane: more would put fewer scores in doubt, but leave the first cache
  int64_t targets;
  int32_t doubt;  // a power of two above every L * number of thresholds that the table tells

  explicit IntervalSizes(int64_t targets) : targets(targets), doubt(L) {
    while (doubt < (smaller<int64_t>(targets, kMostBelow) + 1) * L) doubt *= 2;
  }
  int64_t table_floats() const { return L * places / 2; }
  int64_t counts() const { return targets * L < doubt ? 2 * doubt : (targets + 1) * L + doubt; }
};

struct Strip : IntervalSizes {
  PlaceMap& map;
  const int64_t* thresholds;  // [lanes][targets], ascending standings; padding last
  int lanes;
  uint16_t* table;  // [L][places]: L * how many thresholds are below the place; with `doubt` where it holds some
  int32_t* counts;  // [intervals][L], and what is in doubt by the number of thresholds surely below, which is not used

  int64_t real(int lane) const {
    int64_t n = lane < lanes ? targets : 0;
    while (n && thresholds[lane * targets + n - 1] == INT64_MAX) --n;
    return n;
  }
  float score(int lane, int64_t r) const {
    return float_of(static_cast<int32_t>(thresholds[lane * targets + r] >> 32));
  }

  void prepare() {
    int64_t count[L], most = 0;
    int next[L] = {};
    for (int lane = 0; lane < L; ++lane) {
      count[lane] = real(lane);
      most = most < count[lane] ? count[lane] : most;
      int64_t low = 0, high = count[lane] - 1;
      while (low < high && score(lane, low) == -kInf) ++low;
      while (low < high && score(lane, high) == kInf) --high;
      const double from = low <= high ? score(lane, low) : 0, to = low <= high ? score(lane, high) : 0;
      const double factor = (places - 4) / (to - from);
      const bool finite = from - from == 0 && to - to == 0;
      map.low[lane] = finite ? static_cast<float>(from) : 0;
      map.factor[lane] = finite && factor < 1e30 ? static_cast<float>(factor) : 1e30f;
      map.first[lane] = static_cast<float>(lane * places);
      map.last[lane] = static_cast<float>(lane * places + places - 2);  // the next one says where its thresholds end
      map.origin[lane] = static_cast<float>(lane * places + 1);
    }
    const auto fill = [&](int lane, int to, int64_t below) {
      const int64_t code = below > kMostBelow ? kMostBelow * L + doubt : below * L;
      while (next[lane] < to) table[lane * places + next[lane]++] = static_cast<uint16_t>(code);
    };
    for (int64_t r = 0; r < most; ++r) {
      float limits[L];
      int32_t at[L];
      for (int lane = 0; lane < L; ++lane) limits[lane] = r < count[lane] ? score(lane, r) : 0;
      for (int v = 0; v < NV; ++v) Simd::store(at + v * W, map.place(Simd::load(limits + v * W), v));
      for (int lane = 0; lane < L; ++lane) {
        if (r >= count[lane]) continue;
        fill(lane, at[lane] - lane * places + 1, r);
        table[at[lane]] |= static_cast<uint16_t>(doubt);
      }
    }
    for (int lane = 0; lane < L; ++lane) fill(lane, places, count[lane]);
  }

  // How many thresholds are below this standing, which falls to this place.
  int64_t below(int lane, int32_t place, int64_t standing) const {
    const int64_t least = (table[place] & (doubt - 1)) / L, most = (table[place + 1] & (doubt - 1)) / L;
    const int64_t* from = thresholds + lane * targets + least;
    for (int64_t n = (most < kMostBelow ? most : targets) - least; n > 0;) {
      const int64_t half = (n + 1) / 2;
      from += half & -static_cast<int64_t>(from[half - 1] < standing);
      n -= half;
    }
    return from - (thresholds + lane * targets);
  }

  // Counts a block's scores [n][L]; `at` and `doubts` have room for as many numbers, and one more.
  void count(const float* scores, int n, const int32_t* ids, int32_t* at, int32_t* doubts) const {
    for (int i = 0; i < n; ++i)
      for (int v = 0; v < NV; ++v) Simd::store(at + i * L + v * W, map.place(Simd::load(scores + i * L + v * W), v));
    int doubtful = 0;
    for (int i = 0; i < n; ++i) {
      const int32_t* place = at + i * L;
      int32_t any = 0;
#pragma GCC unroll 32
      for (int lane = 0; lane < L; ++lane) {
        const int32_t code = table[place[lane]];
        ++counts[code + lane];
        any |= code;
      }
      if (any & doubt)
        for (int lane = 0; lane < L; ++lane) {
          doubts[doubtful] = i * L + lane;
          doubtful += (table[place[lane]] & doubt) != 0;
        }
    }
    for (int d = 0; d < doubtful; ++d) {
      const int k = doubts[d];
      ++counts[below(k % L, at[k], standing(scores[k], ids[k / L])) * L + k % L];
    }
  }
};

template <class A>
void beats_with(const BeatsItem& item, Workspace& ws) {
  const SearchSegment& s = *item.segment;
  const PackedQueries<A> queries(s, item.metric, item.first_query, item.n_queries, ws);
  const SegmentTerms constant(s, item.metric);
  const int64_t targets = item.targets;
  const IntervalSizes sizes(targets);
  float* block = ws.floats(kRows, chunks_of(queries.words) * NB * CHUNK);
  float* scores = ws.floats(kScores, 3 * NB * L + L);
  int32_t* places = reinterpret_cast<int32_t*>(scores + NB * L);
  int32_t* doubts = places + NB * L;
  PlaceMap* maps =
      reinterpret_cast<PlaceMap*>(ws.floats(kOut, queries.strips * int64_t{sizeof(PlaceMap) / sizeof(float)}));
  float* tables = ws.floats(kRowPairs, queries.strips * sizes.table_floats());
  int32_t* counts = reinterpret_cast<int32_t*>(ws.floats(kMisc, queries.strips * sizes.counts()));
  const auto strip = [&](int t) {
    return Strip{sizes,
                 maps[t],
                 item.thresholds + (item.first_query + t * L) * targets,
                 static_cast<int>(smaller<int64_t>(L, item.n_queries - t * L)),
                 reinterpret_cast<uint16_t*>(tables + t * sizes.table_floats()),
                 counts + t * sizes.counts()};
  };
  for (int t = 0; t < queries.strips; ++t) strip(t).prepare();
  const RowRange keys{s.keys, s.rows, 0, s.count};
  for (int64_t b = 0; b < item.blocks; ++b) {
    const int64_t begin = item.bounds[b] > item.begin ? item.bounds[b] : item.begin;
    const int64_t end = smaller(item.bounds[b + 1], item.end);
    if (begin >= end) continue;
    std::memset(counts, 0, static_cast<size_t>(queries.strips * sizes.counts()) * sizeof(int32_t));
    for (int64_t first = begin; first < end; first += NB) {
      const int n = static_cast<int>(smaller<int64_t>(end - first, NB));
      pack_rows<A>(keys, first, n, block);
      const BlockTerms terms(A{}, keys, item.metric, first, n, item.bad, ws);
      int32_t ids[NB];
      for (int i = 0; i < n; ++i) ids[i] = id_at(s, first + i);
      for (int t = 0; t < queries.strips; ++t) {
        const Ahead ahead{keys, first + NB, t, queries.strips};
        for (int from = 0; from < n; from += MR) {
          ahead.fetch(from / MR);
          with_count<MR>(smaller(n - from, MR), [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            F acc[R][NV];
            finished_tile<A, R>(constant, block, from, queries, t, terms, acc);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
              for (int v = 0; v < NV; ++v) Simd::store(scores + (from + r) * L + v * W, acc[r][v]);
          });
        }
        if (item.exclude)
          for (int lane = 0; lane < smaller<int64_t>(L, item.n_queries - t * L); ++lane) {
            const int64_t hole = item.exclude[item.first_query + t * L + lane];
            for (int i = 0; hole >= 0 && i < n; ++i)
              if (ids[i] == hole) scores[i * L + lane] = kNan;
          }
        strip(t).count(scores, n, ids, places, doubts);
      }
    }
    for (int64_t q = 0; q < item.n_queries; ++q) {
      const int32_t* beaten = counts + q / L * sizes.counts() + q % L;  // [intervals][L]
      int64_t better = 0;
      for (int64_t r = targets - 1; r >= 0; --r) {
        better += beaten[(r + 1) * L];
        const int64_t column = item.columns[(item.first_query + q) * targets + r];
        if (better)
          __atomic_fetch_add(item.out + ((item.first_query + q) * targets + column) * item.blocks + b, better,
                             __ATOMIC_RELAXED);
      }
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
