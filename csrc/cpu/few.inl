// The screen of a few queries, for which the keys' way from memory is the limit: fp32 products of rows where they lie,
// nothing packed. The additions of a pair come in another order than in the score, so here too a bound decides. Rows
// are taken in turn from two places, since the memory feeds two streams quicker than one.

namespace {

constexpr int kFew = 8;      // queries
constexpr int kStreams = 2;  // places where rows are read
static_assert(kFew <= L && NB % kStreams == 0);

// products [Q] of a row and Q queries, which lie `stride` apart and end in zeros up to a cache line. Returns the row's
// squared norm, where NORM.
template <int Q, bool NORM>
inline float multiply_row(const float* row, int64_t dim, const float* queries, int64_t stride, float* products) {
  constexpr int kSums = Q > 2 ? 2 : 4;  // of a query, so that the additions do not wait for each other
  F acc[kSums][Q + 1];
  for (auto& sums : acc)
    for (F& a : sums) a = Simd::set1(0.0f);
  const auto add = [&](int u, F key, int64_t d) {
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) acc[u][q] = Simd::fma(key, Simd::load(queries + q * stride + d), acc[u][q]);
    if (NORM) acc[u][Q] = Simd::fma(key, key, acc[u][Q]);
  };
  const auto sum = [&](int q) {
    F total = acc[0][q];
    for (int u = 1; u < kSums; ++u) total = Simd::add(total, acc[u][q]);
    return Simd::sum(total);
  };
  int64_t d = 0;
  for (; d + kSums * W <= dim; d += kSums * W)
#pragma GCC unroll 4
    for (int u = 0; u < kSums; ++u) add(u, Simd::load(row + d + u * W), d + u * W);
  for (; d < dim; d += W) add(0, Simd::load_first(row + d, static_cast<int>(smaller<int64_t>(W, dim - d))), d);
  for (int q = 0; q < Q; ++q) products[q] = sum(q);
  return NORM ? sum(Q) : 0.0f;
}

void screen_few(const TopkItem& item, const SearchSegment& s, int64_t begin, int64_t end, Bounded& candidates,
                int64_t* bad, Workspace& ws) {
  const int64_t dim = s.query.dim, stride = padded(dim);
  const int n_queries = static_cast<int>(item.n_queries);
  float* queries = ws.floats(kLanes, n_queries * stride);
  float* line = ws.floats(kLine, dim);
  float* products = ws.floats(kScores, NB * L);
  float* numbers = ws.floats(kRows, KeyBounds::kNumbers * NB);
  std::memset(numbers, 0, KeyBounds::kNumbers * NB * sizeof(float));
  std::memset(products, 0, NB * L * sizeof(float));
  std::memset(queries, 0, static_cast<size_t>(n_queries * stride) * sizeof(float));
  KeyBounds bounds(numbers);
  QueryBounds strip{};
  for (int q = 0; q < n_queries; ++q) {
    const int64_t row = item.first_query + q;
    load_row(queries + q * stride, s.query, row);
    const double length = __builtin_sqrt(squared_norm(queries + q * stride, dim));
    strip.set(q, dim, length, 0, 1, query_terms(item.metric, s.query_factor[row]));
  }
  Screening screening(candidates, s);
  candidates.state.take_any_order();
  const RowRange keys{s.keys, s.rows, 0, s.count};
  const auto add = [&](int i, int64_t row) {
    const float* x = floats_of(keys.matrix, row, line);
    float norm = 0;
    for (int q = 0; q < n_queries; q += 4)
      with_count<4>(smaller(n_queries - q, 4), [&](auto some) {
        constexpr int Q = decltype(some)::value;
        if (q)
          multiply_row<Q, false>(x, dim, queries + q * stride, stride, products + i * L + q);
        else
          norm = multiply_row<Q, true>(x, dim, queries, stride, products + i * L);
      });
    const double squared = ordinary(norm) ? norm : squared_norm(x, dim);
    if (!(squared < __builtin_inf())) note_bad(bad, row);
    bounds.set(i, item.metric, dim, squared, 0);
  };
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
    for (int i = 0; i < kRows; ++i)
      for (int stream = 0; stream < kStreams; ++stream)
        if (i < n[stream]) {
          const int64_t position = first[stream] + i;
          if (position + kSoon < s.count) prefetch_row(keys.matrix, keys.row(position + kSoon));
          add(stream * kRows + i, keys.row(position));
        }
    bounds.finish(NB, dim, nullptr);
    const Blur most = bounds.most(NB);  // rows left from the block before only make it larger
    for (int stream = 0; stream < kStreams; ++stream)
      screening.block<false>(bounds.from(stream * kRows), most, products + stream * kRows * L, first[stream], n[stream],
                             strip, 0);
  }
}

}  // namespace
