// The screen of a handful of queries, for which the keys' way from memory is the limit: fp32 products of rows where
// they lie, nothing packed. The additions of a pair come in another order than in the score, so here too a bound
// decides. Rows are taken in step from four places: the processor prefetches each of them by itself, sooner than when
// it is told to. l2 takes the squared differences themselves, which are as quick here; two such sums differ by a part
// of themselves.
#pragma once
#include "candidates.inl"

namespace {

constexpr int kStreamingQueries = 8;  // queries
constexpr int kStreams = 4;           // places where rows are read
constexpr float kUnderflow = 1e-36f;  // above what the terms that underflow add up to
constexpr int kQueriesAtOnce = 2;     // queries whose sums with so many rows the registers hold
static_assert(kStreamingQueries <= L && NB % kStreams == 0);

template <DType T>
inline F load_numbers(const void* row, int64_t d) {
  if constexpr (T == DType::f32)
    return Simd::load(static_cast<const float*>(row) + d);
  else if constexpr (T == DType::bf16)
    return Simd::load_bf16(static_cast<const uint16_t*>(row) + d);
  else
    return Simd::load_f16(static_cast<const uint16_t*>(row) + d);
}

// Sums of A's terms of kStreams rows, `apart` from each other, and Q queries, which lie `stride` apart and end in zeros
// up to a cache line; where NORM, also the rows' squared norms.
template <class A, DType T, int Q, bool NORM>
inline void multiply_rows(const Matrix& keys, const int64_t (&rows)[kStreams], const float* queries, int64_t stride,
                          float* products, int64_t apart, float* norms) {
  F acc[kStreams][Q + 1];
  const void* data[kStreams];
  for (int r = 0; r < kStreams; ++r) {
    data[r] = row_pointer(keys, rows[r]);
    for (F& a : acc[r]) a = Simd::set1(0.0f);
  }
  const auto add = [&](int r, F key, int64_t d) {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) acc[r][q] = A::step(acc[r][q], key, Simd::load(queries + q * stride + d));
    if (NORM) acc[r][Q] = Simd::fma(key, key, acc[r][Q]);
  };
  int64_t d = 0;
  for (; d + W <= keys.dim; d += W)
#pragma GCC unroll 4
    for (int r = 0; r < kStreams; ++r) add(r, load_numbers<T>(data[r], d), d);
  for (int r = 0; d < keys.dim && r < kStreams; ++r) {
    float last[W] = {};
    to_floats(last, keys, rows[r], d, keys.dim - d);
    add(r, Simd::load(last), d);
  }
  for (int r = 0; r < kStreams; ++r) {
    for (int q = 0; q < Q; ++q) products[r * apart + q] = Simd::sum(acc[r][q]);
    if (NORM) norms[r] = Simd::sum(acc[r][Q]);
  }
}

template <class A, DType T>
void screen_streaming_as(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end,
                         BoundedCandidates& candidates, int64_t* bad, Workspace& ws) {
  constexpr bool l2 = kDifferences<A>;
  const int64_t dim = s.query.dim, stride = padded(dim);
  const int n_queries = static_cast<int>(item.n_queries);
  float* queries = ws.floats(kPanels, n_queries * stride);
  float* line = ws.floats(kRow, dim);
  float* products = ws.floats(kScores, NB * L);
  float* numbers = ws.floats(kKeyBounds, KeyBounds::kNumbers * NB);
  std::memset(numbers, 0, KeyBounds::kNumbers * NB * sizeof(float));
  std::memset(products, 0, NB * L * sizeof(float));
  std::memset(queries, 0, static_cast<size_t>(n_queries * stride) * sizeof(float));
  KeyBounds bounds(numbers);
  QueryBounds strip{};
  for (int q = 0; q < n_queries; ++q) {
    const int64_t row = item.first_query + q;
    load_row(queries + q * stride, s.query, row);
    const double length = l2 ? 0 : __builtin_sqrt(squared_norm(queries + q * stride, dim));
    strip.set(q, item.metric, dim, length, 0, 1, s.query_factor[row]);
  }
  if (l2) {
    const float part = (2 * static_cast<float>(dim) + 32) * 0x1p-24f;
    strip.sum_ratio = (1 + part) / (1 - part);
    for (int i = 0; i < NB; ++i) {
      bounds.multiply[i] = part - 1;
      bounds.high[i] = kUnderflow;
      bounds.low[i] = -kUnderflow;
    }
  }
  SegmentScreen screen(candidates, s);
  candidates.state.take_any_order();
  const RowRange keys{s.keys, s.rows, 0, s.count};
  constexpr int kRows = NB / kStreams;  // of a stream in a block
  const int64_t part = (end - begin + kStreams - 1) / kStreams;
  for (int64_t from = 0; from < part; from += kRows) {
    int64_t first[kStreams];
    int n[kStreams];
    for (int stream = 0; stream < kStreams; ++stream) {
      first[stream] = begin + stream * part + from;
      const int64_t stop = smaller(begin + (stream + 1) * part, end);
      n[stream] = static_cast<int>(smaller<int64_t>(stop - smaller(first[stream], stop), kRows));
    }
    for (int i = 0; i < n[0]; ++i) {
      int64_t rows[kStreams];
      float norms[kStreams];
      for (int stream = 0; stream < kStreams; ++stream) rows[stream] = keys.row(first[i < n[stream] ? stream : 0] + i);
      for (int q = 0; q < n_queries; q += kQueriesAtOnce)
        with_count<kQueriesAtOnce>(smaller(n_queries - q, kQueriesAtOnce), [&](auto some) {
          constexpr int Q = decltype(some)::value;
          float* out = products + i * L + q;
          if (q || l2)
            multiply_rows<A, T, Q, false>(s.keys, rows, queries + q * stride, stride, out, kRows * L, nullptr);
          else
            multiply_rows<A, T, Q, true>(s.keys, rows, queries, stride, out, kRows * L, norms);
        });
      for (int stream = 0; stream < kStreams; ++stream) {
        if (i >= n[stream]) continue;
        const int64_t row = rows[stream];
        const int at = stream * kRows + i;
        if constexpr (l2) {
          float* sums = products + at * L;
          if (!is_finite(sums[0]) && !is_finite(squared_norm(floats_of(s.keys, row, line), dim))) note_bad(bad, row);
          for (int q = 0; q < n_queries; ++q) sums[q] = smaller(sums[q], kLargest);
          continue;
        }
        const double squared =
            ordinary(norms[stream]) ? norms[stream] : squared_norm(floats_of(s.keys, row, line), dim);
        if (!is_finite(squared)) note_bad(bad, row);
        bounds.set(at, item.metric, dim, squared, 0, RowFactor(item.metric, squared, true).multiply);
      }
    }
    if (!l2) bounds.finish(NB, dim, nullptr);
    const ErrorFactors most = bounds.most(NB);  // rows left from the block before only make it larger
    for (int stream = 0; stream < kStreams; ++stream)
      screen.block<false>(bounds.from(stream * kRows), most, products + stream * kRows * L, first[stream], n[stream],
                          strip, 0);
  }
}

template <class A>
void screen_streaming(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end,
                      BoundedCandidates& candidates, int64_t* bad, Workspace& ws) {
  const auto screen = s.keys.dtype == DType::f32    ? screen_streaming_as<A, DType::f32>
                      : s.keys.dtype == DType::bf16 ? screen_streaming_as<A, DType::bf16>
                                                    : screen_streaming_as<A, DType::f16>;
  screen(item, s, begin, end, candidates, bad, ws);
}

}  // namespace
