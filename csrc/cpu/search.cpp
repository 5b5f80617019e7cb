// Top-k, pair scores and beat-counts: cuts the work into items and merges what they found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <limits>
#include <tuple>
#include <utility>

#include "float_bits.h"
#include "metric.h"
#include "plan.h"
#include "pool.h"

namespace fastcompat {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
constexpr int64_t kFactorRows = 512;           // of an item that finds factors
constexpr double kFactorWork = 16;             // products that cost as much as one number of a row that is read once
constexpr int64_t kMinSplitRows = 4096;        // keys of an item, for its own packing of the queries to be worth it
constexpr int64_t kMinCapacity = 16;           // of a list of candidates: so small that a few ties would fill it
constexpr int64_t kMinLanes = 256;             // of a thread, for it to be worth packing all keys
constexpr int64_t kBufferBytes = 16ll << 20;   // candidates of one thread
constexpr int64_t kCachedBytes = 256ll << 10;  // queries that a core's cache holds beside a block of keys

struct Candidate {
  float score;
  int32_t id;
};

bool better(const Candidate& a, const Candidate& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

void check_rows(const char* name, const int64_t* index, int64_t count, int64_t rows) {
  for (int64_t i = 0; index && i < count; ++i)
    if (index[i] < -1 || index[i] >= rows)
      throw std::invalid_argument(std::string("`") + name + "` must hold key numbers from 0 to " +
                                  std::to_string(rows - 1) + ", or -1: entry " + std::to_string(i) + " holds " +
                                  std::to_string(index[i]));
}

void check_sizes(const Segment& s) {
  if (s.keys.rows > std::numeric_limits<int32_t>::max() || s.query.rows > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("more than 2**31 - 1 rows: search in parts and merge the results");
}

// What a sum of each row is multiplied by, and the row first; refuses rows that are not finite.
struct Factors {
  std::vector<float> multiply, lift;

  Factors(const RowRange& rows, Metric metric, const char* side, int segment, int threads)
      : multiply(static_cast<size_t>(rows.count)), lift(static_cast<size_t>(rows.count)) {
    const int64_t parts = (rows.count + kFactorRows - 1) / kFactorRows;
    std::atomic<int64_t> bad{kNone};
    parallel_for(parts, threads_for(threads, kFactorWork, rows.count, rows.matrix.dim), [&](int64_t n, Workspace& ws) {
      const int64_t first = n * kFactorRows;
      RowRange part = rows;
      part.first += first;
      part.count = std::min(kFactorRows, rows.count - first);
      int64_t at = kernels().factors(part, metric, multiply.data() + first, lift.data() + first, ws);
      if (at < 0) return;
      at = part.row(at);
      for (int64_t seen = bad.load(); at < seen && !bad.compare_exchange_weak(seen, at);) {
      }
    });
    if (bad.load() != kNone) throw NonFinite(side, segment, bad.load());
  }
};

// Near the mean of the keys, by a sample: what l2 is screened around. Any vector would do.
constexpr int64_t kCentreRows = 256;  // at most, and at most one row of 64: the sample must cost next to nothing
std::vector<float> centre_of(const Segment& s) {
  const int64_t dim = s.keys.dim, n = std::clamp<int64_t>(s.count / 64, std::min<int64_t>(1, s.count), kCentreRows);
  std::vector<double> sum(static_cast<size_t>(dim));
  std::vector<float> row(static_cast<size_t>(dim)), centre(static_cast<size_t>(dim));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * s.count / n;
    kernels().load_row(row.data(), s.keys, s.rows ? s.rows[at] : at);
    for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
  }
  for (int64_t d = 0; d < dim && n; ++d) {
    centre[d] = static_cast<float>(sum[d] / static_cast<double>(n));
    if (!std::isfinite(centre[d])) centre[d] = 0;  // the row is refused where it is read
  }
  return centre;
}

// Numbers before the blocks of a packed copy: its centre.
int64_t packed_centre(const Matrix& keys, Metric metric) {
  return form_of(metric).differences ? (keys.dim + kCacheLineFloats - 1) / kCacheLineFloats * kCacheLineFloats : 0;
}

// A segment with its queries' factors; those of the keys are found while they are packed.
struct Prepared {
  Factors query;
  std::vector<float> lifted;  // the queries, where some are
  std::vector<float> centre;
  SearchSegment segment;

  Prepared(const Segment& s, Metric metric, int number, int threads)
      : query({s.query, nullptr, 0, s.query.rows}, metric, "query", number, threads),
        segment{s.query, s.keys,   s.rows, s.count, s.scale, s.offset, query.multiply.data(),
                nullptr, s.packed, s.items} {
    const Matrix& q = s.query;
    if (std::any_of(query.lift.begin(), query.lift.end(), [](float lift) { return lift != 1; })) {
      lifted.resize(static_cast<size_t>(q.rows * q.dim));
      std::vector<float> row(static_cast<size_t>(q.dim));
      for (int64_t i = 0; i < q.rows; ++i) {
        kernels().load_row(row.data(), q, i);
        kernels().store_row(lifted.data(), q.dtype, i, row.data(), q.dim, query.lift[i]);
      }
      segment.query = {lifted.data(), q.dtype, q.rows, q.dim, q.dim};
    }
    if (!form_of(metric).differences) return;
    if (s.packed) {
      segment.centre = s.packed;
      segment.packed += packed_centre(s.keys, metric);
    } else {
      centre = centre_of(s);
      segment.centre = centre.data();
    }
  }
  Prepared(const Prepared&) = delete;
};

void refuse_bad(const std::vector<int64_t>& bad) {
  for (size_t s = 0; s < bad.size(); ++s)
    if (bad[s] != kNone) throw NonFinite("keys", static_cast<int>(s), bad[s]);
}

// Top-k of all segments together.
struct Search {
  const std::vector<SearchSegment>& parts;
  Metric metric;
  const TopkFilter& filter;
  int64_t* bad;  // [parts]
  int threads;

  // The best k of B queries that reach their floor [B]; -inf and -1 where there are fewer.
  void best(int64_t first_query, int64_t B, int64_t k, const float* floor, float* scores, int64_t* ids) const {
    const Kernels& kernel = kernels();
    int64_t total = 0, dim = 0;
    for (const SearchSegment& s : parts) {
      total += s.count;
      dim = std::max(dim, s.query.dim);
    }
    const int workers = threads_for(threads, B, total, dim);
    const int64_t wanted = std::min(k, total), capacity = std::max(2 * wanted, kMinCapacity);
    const int64_t fits = kBufferBytes / (capacity * static_cast<int64_t>(sizeof(Candidate)));
    // Every thread gets a block where there are queries enough, else a part of the keys.
    const int64_t share = std::max(kMinLanes, ((B + workers - 1) / workers + kStep - 1) / kStep * kStep);
    const int64_t lane_bytes = std::max<int64_t>(1, (kernel.packed_floats(parts[0].keys, metric) ? 2 : 4) * dim);
    const int64_t cached = std::max<int64_t>(512, kCachedBytes / lane_bytes);
    const int64_t block = block_of(B, lane_bytes, std::min({fits, share, cached}));
    // The best k are the same however the keys are cut, so here the threads may decide: every cut costs survivors.
    const int64_t items = (B + block - 1) / block % workers == 0 ? 1 : 2 * workers;
    const Plan plan(B, total, block, B * wanted * static_cast<int64_t>(sizeof(Candidate)), kMinSplitRows, items);
    std::vector<Candidate> candidates(plan.splits * B * wanted);
    std::vector<int64_t> found(plan.splits * B);
    std::vector<float> shared(floor, floor + B);
    parallel_for(plan.items(), workers, [&](int64_t n, Workspace& ws) {
      const int64_t split = n % plan.splits, first = n / plan.splits * plan.block;
      TopkItem item{};
      item.segments = parts.data();
      item.n_segments = static_cast<int>(parts.size());
      item.metric = metric;
      item.first_query = first_query + first;
      item.n_queries = std::min(plan.block, B - first);
      item.begin = std::min(split * plan.rows, total);
      item.end = std::min(item.begin + plan.rows, total);
      item.k = wanted;
      item.capacity = capacity;
      item.filter = filter;
      item.bad = bad;
      item.room = capacity + kCacheLineFloats;
      item.scores = ws.floats(kCandidates, 2 * item.n_queries * item.room);
      item.ids = reinterpret_cast<int32_t*>(item.scores + item.n_queries * item.room);
      item.found = found.data() + split * B + first;
      item.shared = shared.data() + first;
      kernel.topk(item, ws);
      for (int64_t q = 0; q < item.n_queries; ++q)
        for (int64_t c = 0; c < item.found[q]; ++c)
          candidates[(split * B + first + q) * wanted + c] = {item.scores[q * item.room + c],
                                                              item.ids[q * item.room + c]};
    });
    constexpr int64_t kRows = 16;  // queries that a thread merges at a time
    parallel_for((B + kRows - 1) / kRows, workers, [&](int64_t n, Workspace&) {
      std::vector<Candidate> all;
      for (int64_t i = n * kRows; i < std::min(B, (n + 1) * kRows); ++i) {
        all.clear();
        for (int64_t s = 0; s < plan.splits; ++s) {
          const Candidate* part = candidates.data() + (s * B + i) * wanted;
          all.insert(all.end(), part, part + found[s * B + i]);
        }
        const int64_t filled = std::min<int64_t>(wanted, static_cast<int64_t>(all.size()));
        if (filled < static_cast<int64_t>(all.size()))
          std::nth_element(all.begin(), all.begin() + filled, all.end(), better);
        std::sort(all.begin(), all.begin() + filled, better);
        for (int64_t r = 0; r < k; ++r) {
          scores[i * k + r] = r < filled ? all[r].score : -kInf;
          ids[i * k + r] = r < filled ? all[r].id : -1;
        }
      }
    });
  }
};

// For every query a score that at least k keys reach, but for one query in ten thousand; -inf where it is not worth
// finding. It is the score at a rank of a sample, one key of every kStride: of the best k keys a Poisson number is in
// it.
std::vector<float> expected_floor(const std::vector<SearchSegment>& parts, int64_t k, Metric metric,
                                  const TopkFilter& filter, int threads) {
  constexpr int64_t kStride = 200;
  const int64_t B = parts[0].query.rows;
  std::vector<float> floor(B, -kInf);
  std::vector<SearchSegment> sample = parts;
  std::vector<std::vector<int64_t>> rows(parts.size());
  int64_t total = 0, sampled = 0;
  for (size_t n = 0; n < parts.size(); ++n) {
    const SearchSegment& s = parts[n];
    for (int64_t from = 0; from + kStride <= s.count; from += kStride) {
      // Anywhere in its stretch: keys may come in an order that repeats.
      // Fibonacci hashing: the upper half of a multiple of 2^64 / the golden ratio.
      const uint64_t mixed = static_cast<uint64_t>(from + 1) * 0x9E3779B97F4A7C15u >> 32;
      const int64_t at = from + static_cast<int64_t>(mixed % kStride);
      rows[n].push_back(s.rows ? s.rows[at] : at);
    }
    sample[n].rows = rows[n].data();
    sample[n].count = static_cast<int64_t>(rows[n].size());
    sample[n].packed = nullptr;
    total += s.count;
    sampled += sample[n].count;
  }
  // Poisson(mean) of the best k keys are in the sample. It is skewed, most of all where the mean is small, so four
  // standard deviations get 2.5 on top: `rank` or more of them are in it for at most 5 queries in 100,000.
  const double mean = static_cast<double>(k) / kStride;
  const int64_t rank = static_cast<int64_t>(mean + 4 * std::sqrt(mean) + 2.5) + 1;
  if (k == 0 || total < kKeysPerResult * k || sampled < 4 * rank) return floor;
  std::vector<int64_t> bad(parts.size(), kNone), ids(B * rank);
  std::vector<float> scores(B * rank);
  Search{sample, metric, filter, bad.data(), threads}.best(0, B, rank, floor.data(), scores.data(), ids.data());
  for (int64_t i = 0; i < B; ++i) floor[i] = scores[i * rank + rank - 1];
  return floor;
}

// Refuses results of which float32 cannot tell the order: an infinite score, or one that is missing though there are
// keys, which then score -inf.
void refuse_overflow(const std::vector<Segment>& segments, int64_t k, const TopkFilter& filter, const float* scores,
                     const int64_t* ids) {
  const auto wanted = [&](int64_t query) {
    int64_t count = 0;
    for (const Segment& s : segments)
      for (int64_t at = 0; at < s.count; ++at) {
        const int64_t row = s.rows ? s.rows[at] : at, id = s.items ? s.items[row] : row;
        if (id < 0) continue;
        const bool same = filter.query_labels && filter.query_labels[query] >= 0 &&
                          filter.query_labels[query] == filter.key_labels[id];
        count += !same && !(filter.exclude && filter.exclude[query] == id);
      }
    return count;
  };
  int64_t total = 0;
  for (const Segment& s : segments) total += s.count;
  for (int64_t i = 0; k && i < segments[0].query.rows; ++i) {
    const float* row = scores + i * k;
    const int64_t found = std::find(ids + i * k, ids + (i + 1) * k, -1) - (ids + i * k);
    const bool complete = found == std::min(k, total) || found == std::min(k, wanted(i));
    if (!complete || (found && (row[0] == kInf || row[found - 1] == -kInf))) throw Overflow(i);
  }
}

}  // namespace

int64_t packed_size(const Matrix& keys, int64_t count, Metric metric) {
  const Kernels& kernel = kernels();
  const int64_t block = kernel.packed_floats(keys, metric);
  return block && count ? packed_centre(keys, metric) + block * ((count + kernel.pack_rows - 1) / kernel.pack_rows) : 0;
}

void pack(const Segment& s, Metric metric, float* out, int threads) {
  check_sizes(s);
  const Kernels& kernel = kernels();
  const int64_t rows = 4 * kernel.pack_rows, floats = 4 * kernel.packed_floats(s.keys, metric);
  const float* centre = out;
  if (form_of(metric).differences) {
    const std::vector<float> found = centre_of(s);
    std::fill(std::copy(found.begin(), found.end(), out), out + packed_centre(s.keys, metric), 0.0f);
    out += packed_centre(s.keys, metric);
  }
  std::vector<int64_t> bad(1, kNone);
  parallel_for((s.count + rows - 1) / rows, threads_for(threads, kFactorWork, s.count, s.keys.dim),
               [&](int64_t n, Workspace& ws) {
                 kernel.pack({{s.keys, s.rows, 0, s.count},
                              metric,
                              centre,
                              n * rows,
                              std::min(s.count, (n + 1) * rows),
                              bad.data(),
                              out + n * floats},
                             ws);
               });
  refuse_bad(bad);
}

void topk(const std::vector<Segment>& segments, int64_t k, Metric metric, const TopkFilter& filter, float* scores,
          int64_t* ids, int threads) {
  const int64_t B = segments[0].query.rows;
  std::deque<Prepared> prepared;
  std::vector<SearchSegment> parts;
  for (const Segment& s : segments) {
    check_sizes(s);
    if (!s.items) check_rows("exclude", filter.exclude, B, s.keys.rows);
    prepared.emplace_back(s, metric, static_cast<int>(prepared.size()), threads);
    parts.push_back(prepared.back().segment);
  }
  const std::vector<float> floor = expected_floor(parts, k, metric, filter, threads);
  std::vector<int64_t> bad(parts.size(), kNone);
  const Search search{parts, metric, filter, bad.data(), threads};
  search.best(0, B, k, floor.data(), scores, ids);
  refuse_bad(bad);
  // Where fewer than k keys reach the floor it was too high.
  const auto reached = [&](int64_t i) { return floor[i] == -kInf || scores[i * k + k - 1] >= floor[i]; };
  const std::vector<float> none(B, -kInf);
  for (int64_t i = 0, end; i < B; i = end) {
    for (end = i; end < B && !reached(end);) ++end;
    if (end > i)
      search.best(i, end - i, k, none.data(), scores + i * k, ids + i * k);
    else
      ++end;
  }
  refuse_overflow(segments, k, filter, scores, ids);
}

void pair_scores(const Segment& s, Metric metric, const int64_t* ids, int64_t targets, float* out, int threads) {
  check_sizes(s);
  const Kernels& kernel = kernels();
  const int64_t B = s.query.rows;
  check_rows("targets", ids, B * targets, s.keys.rows);
  std::vector<int64_t> used;
  for (int64_t n = 0; n < B * targets; ++n)
    if (ids[n] >= 0) used.push_back(ids[n]);
  std::sort(used.begin(), used.end());
  used.erase(std::unique(used.begin(), used.end()), used.end());
  if (used.empty()) {
    std::fill(out, out + B * targets, -kInf);
    return;
  }
  const Prepared prepared(s, metric, 0, threads);
  const Factors checked({s.keys, used.data(), 0, static_cast<int64_t>(used.size())}, metric, "keys", 0, threads);
  const int64_t block = block_of(B, 4 * s.query.dim);
  parallel_for((B + block - 1) / block, threads_for(threads, B, targets, s.query.dim), [&](int64_t n, Workspace& ws) {
    kernel.pair_scores({&prepared.segment, metric, n * block, std::min(block, B - n * block), ids, targets, out}, ws);
  });
}

// The thresholds of every query in ascending order: how good a key must be to beat them.
struct SortedThresholds {
  std::vector<int64_t> codes;    // [B, P], INT64_MAX for what nothing beats: padding, and scores that are NaN
  std::vector<int32_t> columns;  // [B, P] where each stood

  SortedThresholds(const float* scores, const int64_t* ids, int64_t B, int64_t P, int threads)
      : codes(B * P), columns(B * P) {
    parallel_for(B, threads_for(threads, B, P, 64), [&](int64_t i, Workspace&) {
      std::vector<std::pair<int64_t, int32_t>> row(P);
      for (int64_t p = 0; p < P; ++p) {
        const float score = scores[i * P + p];
        const int64_t id = ids[i * P + p];
        const bool real = id >= 0 && !std::isnan(score);
        row[p] = {real ? rank_code(score, static_cast<int32_t>(id)) : kNone, static_cast<int32_t>(p)};
      }
      std::sort(row.begin(), row.end());
      for (int64_t p = 0; p < P; ++p) std::tie(codes[i * P + p], columns[i * P + p]) = row[p];
    });
  }
};

void count_beats(const Segment& s, Metric metric, const int64_t* bounds, int64_t blocks, const float* thresholds,
                 const int64_t* threshold_ids, int64_t targets, const int64_t* exclude, int64_t* out, int threads) {
  check_sizes(s);
  const Kernels& kernel = kernels();
  const int64_t B = s.query.rows;
  check_rows("targets", threshold_ids, B * targets, s.keys.rows);
  check_rows("exclude", exclude, B, s.keys.rows);
  std::fill(out, out + B * targets * blocks, 0);
  const Prepared prepared(s, metric, 0, threads);
  const SortedThresholds sorted(thresholds, threshold_ids, B, targets, threads);
  // Sums of whole numbers are the same however the keys are cut, so here the threads may decide.
  const int64_t lane_bytes = 4 * s.query.dim + 16 * targets;  // vectors, thresholds and counts
  const Plan plan(B, s.count, block_of(B, lane_bytes), 1, kMinSplitRows, threads == 1 ? 1 : 4 * threads);
  std::vector<int64_t> bad(1, kNone);
  parallel_for(plan.items(), threads_for(threads, B, s.count, s.query.dim), [&](int64_t n, Workspace& ws) {
    const int64_t split = n % plan.splits, first = n / plan.splits * plan.block;
    BeatsItem item{&prepared.segment,
                   metric,
                   first,
                   std::min(plan.block, B - first),
                   split * plan.rows,
                   std::min((split + 1) * plan.rows, s.count),
                   bounds,
                   blocks,
                   sorted.codes.data(),
                   sorted.columns.data(),
                   targets,
                   exclude,
                   bad.data(),
                   out};
    kernel.count_beats(item, ws);
  });
  refuse_bad(bad);
}

}  // namespace fastcompat
